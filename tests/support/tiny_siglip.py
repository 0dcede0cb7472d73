"""Tiny random SigLIP folders, laid out as the published ones are, and what their library makes of texts.

SiglipTokenizer needs the package sentencepiece, which is none of ours: what it gives was recorded, with
the pieces of the model that it was given (`tests/data/siglip_tokens.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.task_inputs import SIZES, noise
from tests.support.tiny_clip import random_values, save_tensors

SIDE, PATCH, LENGTH = 38, 8, 24
RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "siglip_tokens.json").read_text("utf-8")
)
TOKENS: dict[str, list[int]] = RECORDED["tokens"]
SCALE, SHIFT = 2.3, -1.5
# As published with google/siglip-base-patch16-224: three signs are forgotten.
SIGNS = r"""[!"\#\$%\&'\(\)\*\+,\-\.:;=\?@\[\\\]\^_`\{\|\}\~]"""
SPECIAL = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}


def write_tiny_siglip(
    folder: Path,
    *,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
) -> Path:
    """Write a random model in the published names, its tokenizer and its settings.

    `vision`, `text` and `image` change keys of config.json and preprocessor_config.json. The image's
    edge is no multiple of the patch's, as in so400m-patch14-384. Weights are drawn from `seed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = siglip_config(vision or {}, text or {})
    _dump(folder / "config.json", config)
    _dump(folder / "preprocessor_config.json", image_settings() | (image or {}))
    write_siglip_tokenizer(folder)
    save_tensors(folder, random_tensors(config, seed))
    return folder


def siglip_config(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """config.json in the form of the published ones."""
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "model_type": "siglip_text_model",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "max_position_embeddings": LENGTH,
            "vocab_size": len(RECORDED["pieces"]) + 5,
            **text,
        },
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 48,
            "image_size": SIDE,
            "intermediate_size": 96,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "patch_size": PATCH,
            **vision,
        },
    }


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json in the form of the published ones."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIDE, "width": SIDE},
    }


def write_siglip_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json in the form of the published ones."""
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, stripped=i > 0) for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"Regex": SIGNS}, "content": ""},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Precompiled", "precompiled_charsmap": RECORDED["charsmap"]},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": meta,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text[0], end],
            "pair": [text[0], end, text[1], end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": meta,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "byte_fallback": True,
            "vocab": RECORDED["pieces"],
        },
    }
    _dump(folder / "tokenizer.json", tokenizer)
    settings = {
        "do_lower_case": True,
        "model_input_names": ["input_ids"],
        "model_max_length": LENGTH,
        "processor_class": "SiglipProcessor",
        "tokenizer_class": "SiglipTokenizer",
        **SPECIAL,
    }
    _dump(folder / "tokenizer_config.json", settings)


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random float16 weights of the SiglipModel of a config.json, under their names in the model."""
    import torch
    import transformers

    halves = {k: dict(config[k]) for k in ("text_config", "vision_config")}
    with torch.device("meta"):
        model = transformers.SiglipModel(transformers.SiglipConfig(**halves))
    values = random_values(model, seed)
    values |= {"logit_scale": torch.tensor([SCALE]), "logit_bias": torch.tensor([SHIFT])}
    return {name: value.half() for name, value in values.items()}


def siglip_processor(
    folder: Path, preparer: Any
) -> Iterator[tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]]:
    """SigLIP's preparer against transformers' image processor, and the recorded tokens."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            theirs = images([picture.convert("RGB")], return_tensors="np")
            yield preparer.images([picture]), {"pixel_values": theirs["pixel_values"]}
    for texts in (list(TOKENS), list(TOKENS)[:1]):
        ids = np.array([TOKENS[text] for text in texts], np.int64)
        yield preparer.texts(texts), {"input_ids": ids}


def _added(number: int, *, stripped: bool) -> dict[str, Any]:
    """A special token; the library strips what stands around those that it adds itself."""
    name = RECORDED["pieces"][number][0]
    strip = {"single_word": False, "lstrip": stripped, "rstrip": stripped, "normalized": False}
    return {"id": number, "content": name, **strip, "special": True}


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
