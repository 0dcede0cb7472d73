"""Tiny metric models whose weights depend on numpy only: the same numbers under every library version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HIDDEN, LAYERS, INNER, POSITIONS = 32, 3, 48, 64
WORDS = ["the", "a", "of", "in", "no", "left", "right", "lung", "mass", "nodule", "cyst", "chest", "ray", "ct", "mri", "effusion", "pleural", "normal", "heart", "number", "showing", "small", "kidney"]  # fmt: skip
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789", *".,:;()-[]/"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, *LETTERS, *WORDS, *(f"##{c}" for c in LETTERS[:36]), "##s", "##ing"]
VOCAB = {piece: i for i, piece in enumerate(dict.fromkeys(PIECES))}


def bert_shapes(vocab: int, embedding: int = HIDDEN, positions: int = POSITIONS,
                types: int = 2) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Names and shapes of a BERT encoder with its pooler."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, embedding),
        "embeddings.position_embeddings.weight": (positions, embedding),
        "embeddings.token_type_embeddings.weight": (types, embedding),
        "embeddings.LayerNorm.weight": (embedding,),
        "embeddings.LayerNorm.bias": (embedding,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    if embedding != HIDDEN:
        shapes |= {"encoder.embedding_projection.weight": (HIDDEN, embedding),
                   "encoder.embedding_projection.bias": (HIDDEN,)}  # fmt: skip
    sizes = {
        "attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INNER, HIDDEN), "output.dense": (HIDDEN, INNER),
        "attention.output.LayerNorm": (HIDDEN,), "output.LayerNorm": (HIDDEN,),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, shape in sizes.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Weights by name; large enough that tokens and layers differ."""
    rng = np.random.RandomState(seed)
    made = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name]).astype(np.float32) * np.float32(0.3)
        made[name] = values + np.float32(1) if name.endswith("LayerNorm.weight") else values
    return made


def config(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(VOCAB),
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": INNER, "max_position_embeddings": POSITIONS, "type_vocab_size": 2,
        "pad_token_id": 0, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    } | more  # fmt: skip


def write_wordpiece(folder: Path) -> None:
    """The same tokenizer as tokenizer.json and as vocab.txt, for fast and slow readers."""
    tokenizer = Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])],
    )  # fmt: skip
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": POSITIONS,
                "do_lower_case": True, "pad_token": "[PAD]", "unk_token": "[UNK]",
                "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_byte_level(folder: Path) -> int:
    """A RoBERTa tokenizer of single bytes and a few merges; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("n", "o"), ("l", "e"), ("le", "f"), ("lef", "t"), ("Ġ", "a"), ("i", "n")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "RobertaTokenizer", "model_max_length": 128})
    )
    return len(vocab)


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def write_bert(folder: Path) -> Path:
    """For BERTScore: a plain BERT."""
    folder.mkdir(parents=True)
    write_wordpiece(folder)
    return _write(folder, config(), drawn(bert_shapes(len(VOCAB)), 1))


def write_bleurt(folder: Path, embedding: int | None = 16) -> Path:
    """For BLEURT: embeddings of another size with a projection, as BLEURT-20, or plain with None."""
    folder.mkdir(parents=True)
    write_wordpiece(folder)
    shapes = bert_shapes(len(VOCAB), embedding or HIDDEN)
    named = {f"bleurt.{n}": s for n, s in shapes.items()}
    named |= {"classifier.weight": (1, HIDDEN), "classifier.bias": (1,)}
    settings = config(model_type="bleurt", architectures=["BleurtForSequenceClassification"],
                      embedding_size=embedding, num_labels=1)  # fmt: skip
    return _write(folder, settings, drawn(named, 2))


def write_roberta(folder: Path) -> Path:
    """For BERTScore: a plain RoBERTa."""
    folder.mkdir(parents=True)
    vocab = write_byte_level(folder)
    settings = config(model_type="roberta", architectures=["RobertaModel"], vocab_size=vocab,
                      pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
                      max_position_embeddings=130, layer_norm_eps=1e-5)  # fmt: skip
    return _write(folder, settings, drawn(bert_shapes(vocab, positions=130, types=1), 5))


def write_alignscore(folder: Path) -> Path:
    """For AlignScore: RoBERTa with its heads, names as in the published checkpoint."""
    folder.mkdir(parents=True)
    vocab = write_byte_level(folder)
    shapes = {f"base_model.{n}": s for n, s in bert_shapes(vocab, positions=130, types=1).items()}
    shapes |= {"tri_layer.weight": (3, HIDDEN), "tri_layer.bias": (3,),
               "bin_layer.weight": (2, HIDDEN), "bin_layer.bias": (2,)}  # fmt: skip
    settings = config(model_type="roberta", architectures=["RobertaModel"], vocab_size=vocab,
                      pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
                      max_position_embeddings=130, layer_norm_eps=1e-5)  # fmt: skip
    return _write(folder, settings, drawn(shapes, 3))


def write_chexbert(folder: Path) -> Path:
    """For CheXbert: BERT with 14 heads, names as in the published checkpoint."""
    folder.mkdir(parents=True)
    write_wordpiece(folder)
    shapes = {f"bert.{n}": s for n, s in bert_shapes(len(VOCAB)).items()}
    for i in range(14):
        size = 4 if i < 13 else 2
        shapes |= {f"linear_heads.{i}.weight": (size, HIDDEN), f"linear_heads.{i}.bias": (size,)}
    return _write(folder, config(), drawn(shapes, 4))


RADGRAPH = {
    "0": {"text": "Small left effusion . No pneumothorax .", "entities": {
        "1": {"tokens": "Small", "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": [["modify", "3"]]},
        "2": {"tokens": "left", "label": "ANAT-DP", "start_ix": 1, "end_ix": 1, "relations": []},
        "3": {"tokens": "effusion", "label": "OBS-DP", "start_ix": 2, "end_ix": 2, "relations": [["located_at", "2"]]},
        "4": {"tokens": "pneumothorax", "label": "OBS-DA", "start_ix": 5, "end_ix": 5, "relations": []}}},
    "1": {"text": "Small right effusion . No pneumothorax .", "entities": {
        "1": {"tokens": "small", "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": [["modify", "3"]]},
        "2": {"tokens": "right", "label": "ANAT-DP", "start_ix": 1, "end_ix": 1, "relations": []},
        "3": {"tokens": "effusion", "label": "OBS-DP", "start_ix": 2, "end_ix": 2, "relations": [["located_at", "2"]]},
        "4": {"tokens": "pneumothorax", "label": "OBS-DA", "start_ix": 5, "end_ix": 5, "relations": []}}},
    "2": {"text": "Large effusion", "entities": {
        "1": {"tokens": "Large", "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": [["modify", "2"]]},
        "2": {"tokens": "effusion", "label": "OBS-DP", "start_ix": 1, "end_ix": 1, "relations": []}}},
    "3": {"text": "Unremarkable study", "entities": {}},
}  # fmt: skip
RADGRAPH_PAIRS = (
    ("Small left effusion. No pneumothorax.", "Small right effusion. No pneumothorax."),
    ("Small left effusion. No pneumothorax.", "Large effusion"),
    ("Large effusion", "Large effusion"),
    ("Large effusion", "Unremarkable study"),
)
LONG = " ".join(f"Sentence number {i} says that the left lung is normal." for i in range(90))
ALIGN_PAIRS = (
    ("CT of the chest. A mass in the left lung.", "A mass is in the left lung. No effusion."),
    ("No effusion.", "There is a small pleural effusion in the right lung"),
    (LONG, "The left lung is normal. There is no mass."),
    ("Normal heart.", " ".join(["a very long claim about the heart and lungs"] * 12)),
)


def write_clip(folder: Path) -> Path:
    """For image-caption similarity: a CLIP of transformers with its image processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir(parents=True)
    write_wordpiece(folder)
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(
        text_config=part | {"vocab_size": len(VOCAB), "max_position_embeddings": 32,
                            "eos_token_id": VOCAB["[SEP]"], "pad_token_id": 0},
        vision_config=part | {"image_size": 32, "patch_size": 8}, projection_dim=16,
    )).eval()  # fmt: skip
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
