"""A tiny random Moondream2 model folder, laid out as the revisions of 2025 are published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

WORDS, SPARE = 320, 5
START = "<|endoftext|>"
SIDE, PATCH, MARGIN, CROPS = 24, 4, 1, 12
ROWS = (SIDE // PATCH) ** 2
SIZES: dict[str, dict[str, int]] = {
    "text": {
        "dim": 64,
        "ff_dim": 96,
        "n_layers": 2,
        "max_context": 512,
        "n_heads": 4,
        "prefix_attn": 1 + ROWS,
    },
    "vision": {
        "enc_dim": 32,
        "enc_patch_size": PATCH,
        "enc_n_layers": 2,
        "enc_ff_dim": 48,
        "enc_n_heads": 2,
        "proj_out_dim": 64,
        "crop_size": SIDE,
        "in_channels": 3,
        "max_crops": CROPS,
        "overlap_margin": MARGIN,
        "proj_inner_dim": 96,
    },
    "region": {
        "dim": 64,
        "coord_feat_dim": 8,
        "coord_out_dim": 16,
        "size_feat_dim": 12,
        "size_out_dim": 24,
        "inner_dim": 32,
    },
}


def write_tiny_moondream(folder: Path, *, seed: int = 0, **tokens: Any) -> Path:
    """Write a random model with the published names, its tokenizer and its config.json.

    `tokens` change the tokenizer's part of the config. Crops of 24 pixels in 6 x 6 patches, of which
    1 on each side overlaps. Weights are about four times as large as usual, so that greedy text varies.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(folder)
    text = {**SIZES["text"], "vocab_size": tokenizer.get_vocab_size() + SPARE}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(text["vocab_size"]):
        noise = torch.randn(shape, generator=generator)
        if name.rpartition(".")[0].rpartition(".")[2] in ("ln", "ln1", "ln2", "post_ln"):
            tensors[name] = (float(name.endswith("weight")) + 0.1 * noise).half()
        else:
            tensors[name] = ((0.2 if name.endswith("bias") else 0.16) * noise).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["HfMoondream"],
        "model_type": "moondream1",
        "torch_dtype": "float16",
        # The published folder names its own code, which is never run.
        "auto_map": {
            "AutoConfig": "hf_moondream.HfConfig",
            "AutoModelForCausalLM": "hf_moondream.HfMoondream",
        },
        "config": {
            **SIZES,
            "text": text,
            "tokenizer": {**prompt_tokens(tokenizer), **tokens},
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def shapes(vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as published, written down from the published class."""
    text, vision, region = SIZES["text"], SIZES["vision"], SIZES["region"]
    dim, width = text["dim"], vision["enc_dim"]
    yield "model.text.wte", (vocabulary, dim)
    for i in range(text["n_layers"]):
        yield from _norm(f"model.text.blocks.{i}.ln", dim)
        yield from _block(f"model.text.blocks.{i}.", dim, text["ff_dim"])
    yield from _norm("model.text.post_ln", dim)
    yield from _linear("model.text.lm_head", vocabulary, dim)
    yield from _linear("model.vision.patch_emb", width, 3 * PATCH * PATCH)
    yield "model.vision.pos_emb", (1, ROWS, width)
    for i in range(vision["enc_n_layers"]):
        for norm in ("ln1", "ln2"):
            yield from _norm(f"model.vision.blocks.{i}.{norm}", width)
        yield from _block(f"model.vision.blocks.{i}.", width, vision["enc_ff_dim"])
    yield from _norm("model.vision.post_ln", width)
    yield from _linear("model.vision.proj_mlp.fc1", vision["proj_inner_dim"], 2 * width)
    yield from _linear("model.vision.proj_mlp.fc2", dim, vision["proj_inner_dim"])
    yield "model.region.coord_features", (1, region["coord_feat_dim"] // 2)
    yield "model.region.size_features", (2, region["size_feat_dim"] // 2)
    for part, features, bins in (
        ("coord", region["coord_feat_dim"], region["coord_out_dim"]),
        ("size", region["size_feat_dim"], region["size_out_dim"]),
    ):
        yield from _linear(f"model.region.{part}_encoder", dim, features)
        yield from _linear(f"model.region.{part}_decoder.fc1", region["inner_dim"], dim)
        yield from _linear(f"model.region.{part}_decoder.fc2", bins, region["inner_dim"])


def prompt_tokens(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer part of the published settings, with this tokenizer's own tokens."""

    def ids(*words: str) -> list[int]:
        return [token for word in words for token in tokenizer.encode(word).ids]

    start = tokenizer.token_to_id(START)
    query = {
        "prefix": ids("\n", "\n", "Question", ":"),
        "suffix": ids("\n", "\n", "Answer", ":"),
    }
    caption = {"normal": ids("\n", "\n", "Caption", ":")}
    return {
        "bos_id": start,
        "eos_id": start,
        "templates": {"caption": caption, "query": query},
    }


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _block(name: str, dim: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(f"{name}attn.qkv", 3 * dim, dim)
    yield from _linear(f"{name}attn.proj", dim, dim)
    yield from _linear(f"{name}mlp.fc1", inner, dim)
    yield from _linear(f"{name}mlp.fc2", dim, inner)


def _write_tokenizer(folder: Path) -> Any:
    """Train a byte-level BPE tokenizer whose start token stands last, as in the published one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=WORDS, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([START])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": START,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer
