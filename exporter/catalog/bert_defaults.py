"""What config.json stands for where it has no key: BERT's and DistilBERT's classes, and the models that
the published code of BiomedCLIP and MedCLIP names.
"""

from __future__ import annotations

from exporter.catalog.schema import Value

# BertConfig's and DistilBertConfig's, whose names differ where their values do.
BERT: dict[str, Value] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
    "activation": "gelu",
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}
_TEXT: dict[str, Value] = {
    "text_config.model_type": "bert",
    "text_config.hidden_size": 768,
    "text_config.intermediate_size": 3072,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 12,
    "text_config.max_position_embeddings": 512,
    "text_config.type_vocab_size": 2,
    "text_config.layer_norm_eps": 1e-12,
}
BIOMEDCLIP: dict[str, Value] = {
    "projection_dim": 512,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 16,
    "vision_config.layer_norm_eps": 1e-6,
    **_TEXT,
    "text_config.vocab_size": 30522,
    "text_config.context_length": 256,
}
MEDCLIP: dict[str, Value] = {
    "projection_dim": 512,
    "vision_config.model_type": "swin",
    "vision_config.image_size": 224,
    "vision_config.patch_size": 4,
    "vision_config.embed_dim": 96,
    "vision_config.depths": (2, 2, 6, 2),
    "vision_config.num_heads": (3, 6, 12, 24),
    "vision_config.window_size": 7,
    "vision_config.mlp_ratio": 4.0,
    "vision_config.layer_norm_eps": 1e-5,
    **_TEXT,
    "text_config.vocab_size": 28996,
    "text_config.context_length": 77,
}
