"""Tiny random BERT and DistilBERT folders, laid out as the published ones are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

POSITIONS = 48
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("no finding", "effusion", "pneumonia")
# TinyBERT's head of 26 values, which is no multiple of 8.
BERT = {"hidden_size": 52, "num_attention_heads": 2, "intermediate_size": 80}
DISTILBERT = {"dim": 64, "n_heads": 4, "hidden_dim": 96, "n_layers": 2}


def write_tiny_bert(
    folder: Path,
    *,
    seed: int = 0,
    kind: str = "bert",
    architecture: str | None = None,
    old_names: bool = False,
    bare: bool = False,
    dtype: str = "float16",
    **changed: Any,
) -> Path:
    """Write a random model, its tokenizer and its settings, and return `folder`.

    `architecture`: the class of transformers whose tensors are written, None for the pre-training
    class without saying so in config.json (as BioClinicalBERT does); `old_names`: gamma and beta;
    `bare`: without the prefix of the encoder. `changed` are keys of config.json.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    words = write_wordpiece(folder)
    config = {"model_type": kind, **_sizes(kind, words), **changed}
    if architecture is not None:
        config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = random_bert(config, seed)
    tensors = {n: t.to(getattr(torch, dtype)).contiguous() for n, t in model.state_dict().items()}
    if bare:
        tensors = {n.removeprefix(f"{kind}."): t for n, t in tensors.items()}
    if old_names:
        tensors = {_old(n): t for n, t in tensors.items()}
    unshared = {n: t.clone() for n, t in tensors.items()}
    save_file(unshared, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_bert(config: dict[str, Any], seed: int) -> Any:
    """The torch model of a config.json, with weights that make texts differ."""
    import torch
    import transformers

    default = {"bert": "BertForPreTraining", "distilbert": "DistilBertForMaskedLM"}
    name = (config.get("architectures") or [default[config["model_type"]]])[0]
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class.from_dict(config)).eval()
    spread(model, seed)
    return model


def spread(model: Any, seed: int) -> None:
    """Larger random weights than usual, half float precision, so that outputs vary with inputs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                values = 1 + 0.1 * noise
            elif name.endswith("bias"):
                values = 0.1 * noise
            elif "embedding" in name:
                values = noise
            else:
                values = noise * (1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2)
            parameter.copy_(values.half().float())


def write_wordpiece(folder: Path, *, limit: int = POSITIONS) -> int:
    """Write BERT's kind of tokenizer (cased, [CLS] and [SEP] around a text); returns its size.

    Its pieces are letters and the halves of words, in a fixed order: a trainer would give ties in
    another order each time, and with it another model.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import BertProcessing

    words = [w for sentence in SENTENCES for w in re.findall(r"[A-Za-z]+|\d+|[^\w\s]", sentence)]
    letters = sorted({letter for word in words for letter in word})
    halves = {part for w in words for part in (w[: len(w) // 2], "##" + w[len(w) // 2 :]) if part}
    pieces = [*letters, *(f"##{letter}" for letter in letters), *sorted(halves - {*letters, "##"})]
    vocabulary = list(dict.fromkeys([*SPECIAL, *pieces]))
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = BertWordPieceTokenizer(ids, lowercase=False)
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": False,
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_max_length": limit,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(ids)


def bert_sizes(words: int) -> dict[str, Any]:
    """A tiny BERT's part of a config.json."""
    return {
        **BERT,
        "num_hidden_layers": 2,
        "vocab_size": words,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }


def _sizes(kind: str, words: int) -> dict[str, Any]:
    if kind == "bert":
        return bert_sizes(words)
    table = {"vocab_size": words, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    return {**DISTILBERT, **table, "activation": "gelu", "sinusoidal_pos_embds": False}


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
