"""A tiny random ViT-GPT2 captioner's folder, laid out as the published one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

SIDE, PATCH = 32, 8
ROWS = (SIDE // PATCH) ** 2 + 1
WORDS, CONTEXT = 320, 128
END = "<|endoftext|>"
# Newest name to the published one, of transformers up to 4.57.
PUBLISHED = (
    ("encoder.layers.", "encoder.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def write_tiny_ved(
    folder: Path,
    *,
    seed: int = 0,
    old: bool = True,
    dtype: str = "float16",
    encoder: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
) -> Path:
    """Write a random model, its tokenizer and its settings, and return `folder`.

    `old`: tensor names and files as published, with the masks that older transformers saved and a head
    beside the embedding; else those of transformers 5. `encoder` and `decoder` change keys of
    config.json. Weights are about four times as large as usual, so that greedy text varies.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    end = write_end_tokenizer(folder, CONTEXT)
    config = _config(end, encoder or {}, decoder or {})
    model_class = transformers.VisionEncoderDecoderModel
    torch.manual_seed(seed)
    model = model_class(transformers.VisionEncoderDecoderConfig.from_dict(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "ln_" in name or "layernorm" in name:
            values = float(name.endswith("weight")) + 0.1 * noise
        else:
            values = (0.2 if name.endswith("bias") else 0.16) * noise
        tensors[_published(name) if old else name] = values.to(getattr(torch, dtype))
    if old:
        tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"].clone()
        mask = torch.ones((CONTEXT, CONTEXT), dtype=torch.uint8).tril()[None, None]
        for i in range(config["decoder"]["n_layer"]):
            for kind in ("attn", "crossattention"):
                tensors[f"decoder.transformer.h.{i}.{kind}.bias"] = mask.clone()
                masked = torch.tensor(-1e4, dtype=torch.float32)
                tensors[f"decoder.transformer.h.{i}.{kind}.masked_bias"] = masked
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _dump(folder / "config.json", config)
    _write_image_settings(folder, old)
    return folder


def _published(name: str) -> str:
    for new, old in PUBLISHED:
        name = name.replace(new, old)
    return name


def _config(end: int, encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["VisionEncoderDecoderModel"],
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": end,
        "decoder": {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "add_cross_attention": True,
            "is_decoder": True,
            "n_ctx": CONTEXT,
            "n_positions": CONTEXT,
            "n_embd": 64,
            "n_head": 4,
            "n_inner": None,
            "n_layer": 3,
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": end,
            "eos_token_id": end,
            "decoder_start_token_id": end,
            "vocab_size": end + 1,
            "tie_word_embeddings": True,
            **decoder,
        },
        "encoder": {
            "model_type": "vit",
            "architectures": ["ViTModel"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "num_channels": 3,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            **encoder,
        },
    }


def write_end_tokenizer(folder: Path, context: int) -> int:
    """Train a byte-level BPE tokenizer with GPT-2's one special token, whose id is returned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=WORDS, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "model_max_length": context,
    }
    _dump(folder / "tokenizer_config.json", settings)
    found: int = tokenizer.token_to_id(END)
    return found


def _write_image_settings(folder: Path, old: bool) -> None:
    settings: dict[str, Any] = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    kind: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
    size: Any = {"height": SIDE, "width": SIDE}
    if old:
        kind, size = {"feature_extractor_type": "ViTFeatureExtractor"}, SIDE
    _dump(folder / "preprocessor_config.json", {**settings, **kind, "size": size})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
