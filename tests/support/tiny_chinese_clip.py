"""A tiny random Chinese-CLIP folder, with the files that the published ones have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.families.base import Feed
from tests.support.task_inputs import SIZES, TEXTS, noise
from tests.support.tiny_bert import SPECIAL
from tests.support.tiny_clip import MEAN, SENTENCES, STD, random_values, save_tensors

SIDE, PATCH, PROJECTION, POSITIONS = 32, 8, 40, 64
LABELS = ("气胸", "胸腔积液", "未见异常")
REPORTS = (
    *LABELS,
    "双肺纹理清晰，心影大小形态正常，左侧可见中等量胸腔积液，无气胸。",
    "腹部CT平扫：肝右叶见一直径约19 mm的低密度病灶。",
)


def write_tiny_chinese_clip(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random ChineseCLIPModel in float32 with the buffers that were saved then, its vocab.txt
    and its settings.

    `tokenizer`: with the files that transformers' AutoTokenizer makes of vocab.txt, which the published
    repository has not. `vision`, `text` and `top` change keys of config.json.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    config = chinese_config(len(words), vision=vision or {}, text=text or {}, top=top)
    _dump(folder / "config.json", config)
    _dump(folder / "preprocessor_config.json", image_settings())
    if tokenizer:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    tensors = random_values(chinese_model(config), seed)
    rows = (SIDE // PATCH) ** 2 + 1
    positions = config["text_config"]["max_position_embeddings"]
    for part, length in (("text", positions), ("vision", rows)):
        tensors[f"{part}_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_tensors(folder, tensors)
    return folder


def chinese_model(config: dict[str, Any], *, device: str = "meta") -> Any:
    """transformers' model of a config.json, by default without weights."""
    import torch
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device(device):
        return ChineseCLIPModel(ChineseCLIPConfig(**settings)).eval()


def vocabulary() -> list[str]:
    """Special tokens, each sign of the reports, and letters and digits as words and pieces of words."""
    signs = {sign for text in REPORTS for sign in text.lower() if not sign.isspace()}
    letters = sorted({c for text in SENTENCES for c in text if c.isalnum()} | set("0123456789"))
    chinese = sorted(signs - set(letters) | set("的照片.,:"))
    words = ("ct", "##usion", "effusion", "the", "lobe")
    return list(dict.fromkeys((*SPECIAL, *chinese, *letters, *(f"##{c}" for c in letters), *words)))


def chinese_config(
    words: int, *, vision: dict[str, Any], text: dict[str, Any], top: dict[str, Any]
) -> dict[str, Any]:
    """config.json in the form of the published ones."""
    return {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "projection_dim": PROJECTION,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "chinese_clip_text_model",
            "hidden_size": 52,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": words,
            "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **text,
        },
        "vision_config": {
            "model_type": "chinese_clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            **vision,
        },
        **top,
    }


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json in the form of the published one."""
    return {
        "do_center_crop": False,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ChineseCLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": {"height": SIDE, "width": SIDE},
    }


def chinese_processor(folder: Path, preparer: Any) -> Iterator[tuple[Feed, Feed]]:
    """The preparer against transformers' image processor, and its tokenizer cut at 52 tokens."""
    from transformers import AutoTokenizer
    from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
        ChineseCLIPImageProcessorPil,
    )

    images = ChineseCLIPImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            theirs = images([picture.convert("RGB")], return_tensors="np")
            yield preparer.images([picture]), {"pixel_values": theirs["pixel_values"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hard = ("左肺CT：  19 mm\t結節 Café [SEP] é", "")
    for texts in (TEXTS, TEXTS[:1], REPORTS, REPORTS[:1], hard):
        found = dict(
            tokenizer(
                list(texts), padding=True, truncation=True, max_length=52, return_tensors="np"
            )
        )
        # No text has a second sentence; the model takes 0 without being told.
        assert not found.pop("token_type_ids").any()
        yield preparer.texts(texts), found


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
