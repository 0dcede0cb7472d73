"""Images of ViT with Pillow and numpy: no torch, no transformers.

Computes bit for bit what transformers' ``ViTImageProcessorPil`` (5.x) computes: the image is resized
to a square (its shape is not kept) and normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.clip import ClipImageSettings
from exporter.families.images.pixels import edge, read_normalisation

# ViT's own colours, the defaults of transformers' class.
MEAN = STD = (0.5, 0.5, 0.5)
SIDE = 224


def read_vit_settings(raw: Mapping[str, Any], where: str) -> ClipImageSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take transformers' defaults.

    Raises `InputRefused` naming `where` on wrong types, sizes that no image could have, and a crop.
    """
    try:
        if raw.get("do_center_crop"):
            raise ValueError("do_center_crop is true")
        size = SIDE if raw.get("size") is None else raw["size"]
        # A plain number is the published form of a square.
        height, width = (size,) * 2 if isinstance(size, int) else (size["height"], size["width"])
        return ClipImageSettings(
            size=(edge(height), edge(width)) if raw.get("do_resize", True) else None,
            crop=None,
            square=False,
            resample=int(Image.Resampling(raw.get("resample", Image.Resampling.BILINEAR))),
            normalisation=read_normalisation(raw, MEAN, STD),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those of a ViT "
            "image processor"
        ) from error
