"""The families there are. A new family is one file and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from exporter.core.errors import InputRefused
from exporter.families import (
    blip2,
    cnn_transformer,
    idefics,
    idefics3,
    llava,
    moondream,
    qwen_vl,
    vision_encoder_decoder,
)
from exporter.families.base import Family

FAMILIES: dict[str, Family] = {
    "blip2": cast(Family, blip2),
    "idefics": cast(Family, idefics),
    "idefics3": cast(Family, idefics3),
    "llava": cast(Family, llava),
    "moondream": cast(Family, moondream),
    "qwen_vl": cast(Family, qwen_vl),
    "vision_encoder_decoder": cast(Family, vision_encoder_decoder),
    "cnn_transformer": cast(Family, cnn_transformer),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json by its model_type. Raises `InputRefused` when unknown."""
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.MODEL_TYPES:
            return family
    known = sorted(t for f in FAMILIES.values() for t in f.MODEL_TYPES)
    raise InputRefused(
        f"config.json: model_type {kind!r} is of no known family; known: {', '.join(known)}"
    )
