"""Tiny random BLIP-2 and XrayGPT model folders, laid out as the published parts are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tiny_llava import CONTEXT, MEAN, STD, write_tokenizer

SIDE, PATCH, QUERIES = 32, 8, 5
# Newest name to XrayGPT's, one expression at a time: written apart from the map that is tested.
XRAYGPT = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"visual_encoder.blocks.\1.attn."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.(.*)attention\.attention\.", r"Qformer.bert.\1attention.self."),
    (r"^qformer\.", "Qformer.bert."),
    (r"^language_projection\.", "llama_proj."),
    (r"^language_model\.", "llama_model."),
)  # fmt: skip


def write_tiny_blip2(
    folder: Path,
    *,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    qformer: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    decoder: str = "opt",
    **top: Any,
) -> Path:
    """Write a random model in transformers' layout, without a chat template; `decoder`: opt or llama.

    `vision`, `qformer`, `text` and `top` change keys of config.json. Weights are drawn from `seed`,
    about four times as large as usual, so that greedy text varies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, image=True)
    # Blip2Processor knows the token by its text.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    _dump(path, {key: value for key, value in settings.items() if key != "image_token"})
    sizes = {**_text(ids, decoder), **(text or {})}
    config = _config(ids, sizes, vision or {}, qformer or {}, top)
    _save(folder, random_tensors(config, seed))
    _dump(folder / "config.json", config)
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    _dump(folder / "preprocessor_config.json", images)
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    _dump(folder / "generation_config.json", {**special, "pad_token_id": ids["<pad>"]})
    _dump(folder / "processor_config.json", {"num_query_tokens": QUERIES})
    return folder


def write_tiny_xraygpt(folder: Path, *, seed: int = 0) -> Path:
    """The same in XrayGPT's layout: the state dict of its code, Vicuna's tokenizer, no image token."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _with_stop_tokens(folder, write_tokenizer(folder, image=False))
    config = _config(ids, _text(ids, "llama"), {}, {}, {})
    _save(folder, published(random_tensors(config, seed)))
    parts = {key: config[key] for key in ("text_config", "vision_config", "qformer_config")}
    _dump(
        folder / "config.json",
        {"architectures": ["MiniGPT4"], "model_type": "mini_gpt4", "num_query_tokens": QUERIES, **parts},
    )  # fmt: skip
    raw = {"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    _dump(folder / "preprocessor_config.json", raw)
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    _dump(folder / "generation_config.json", special)
    return folder


def broken(source: Path, folder: Path, change: dict[str, np.ndarray | None]) -> Path:
    """A copy of the model folder `source` with tensors replaced, or without them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({n: v for n, v in tensors.items() if v is not None}, path, {"format": "pt"})
    return folder


def published(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by newest name as XrayGPT has them; the keys of the tower have no bias."""
    found = {}
    for newest, value in tensors.items():
        fitting = (re.subn(pattern, old, newest) for pattern, old in XRAYGPT)
        name = next((found for found, times in fitting if times), newest)
        if name.endswith("attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            found[f"{stem}q_bias"], _, found[f"{stem}v_bias"] = value.chunk(3)
        else:
            found[name] = value
    return found


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every weight of the model by its newest name, in float16."""
    import torch
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        parsed = transformers.Blip2Config(**settings)
        model = transformers.Blip2ForConditionalGeneration(parsed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif name == "query_tokens":
            value = noise
        else:
            value = (0.05 if name.endswith("bias") else 0.08) * noise
        if name.endswith("self_attn.qkv.bias"):
            third = len(value) // 3
            value[third : 2 * third] = 0
        tensors[name] = value.half()
    return tensors


def _with_stop_tokens(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """Adds the two tokens to the vocabulary of which Llama's tokenizer makes ``###``."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    more = {text: len(ids) + place for place, text in enumerate(("▁###", "##"))}
    tokenizer["model"]["vocab"] |= more
    _dump(path, tokenizer)
    return {**ids, **more}


def _text(ids: dict[str, int], decoder: str) -> dict[str, Any]:
    own = {"llama": {"intermediate_size": 128, "rms_norm_eps": 1e-6}, "opt": {"ffn_dim": 128}}
    return {
        "model_type": decoder,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": int(np.ceil(len(ids) / 64)) * 64 if "<image>" in ids else len(ids),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids.get("<pad>", 0),
        **own[decoder],
    }


def _config(
    ids: dict[str, int],
    text: dict[str, Any],
    vision: dict[str, Any],
    qformer: dict[str, Any],
    top: dict[str, Any],
) -> dict[str, Any]:
    tower = {
        "model_type": "blip_2_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    queries = {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "encoder_hidden_size": 48,
        "vocab_size": 64,
    }
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "image_token_index": ids.get("<image>", 0),
        "num_query_tokens": QUERIES,
        "torch_dtype": "float16",
        "use_decoder_only_language_model": True,
        "text_config": text,
        "vision_config": {**tower, **vision},
        "qformer_config": {**queries, **qformer},
        **top,
    }


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    stored = {name: value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
