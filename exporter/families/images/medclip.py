"""Images of MedCLIP with Pillow and numpy: gray, padded with black to a square, resized, normalised.

After MedCLIPFeatureExtractor (github.com/RyanWangZf/MedCLIP at 9c3396f2, medclip/dataset.py): the square
is never smaller than what the tower takes, and both resizing and normalising are of one channel, which
the model repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.clip import MAX_PIXELS
from exporter.families.images.pixels import resized
from exporter.families.layouts.medclip import PROCESSOR


@dataclass(frozen=True)
class MedclipImages:
    """Edge of the square in pixels; `mean` and `std` are of values between 0 and 1."""

    side: int
    mean: float
    std: float

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """Pixel values ``[3, side, side]`` of an image of any Pillow mode.

        Raises `InputRefused` for an image whose square would be too large.
        """
        square = max(self.side, *image.size)
        if square * square > MAX_PIXELS:
            raise InputRefused(
                f"image of {image.width} x {image.height} pixels would be padded to {square} x {square}; "
                f"expected at most {MAX_PIXELS} pixels, crop it"
            )
        gray = image.convert("L") if image.mode != "L" else image
        canvas = Image.new("L", (square, square))
        canvas.paste(gray, ((square - gray.width) // 2, (square - gray.height) // 2))
        small = resized(canvas, self.side, self.side, Image.Resampling.BICUBIC)
        values = np.asarray(small).astype(np.float32) / np.float32(255.0)
        values = (values - np.float32(self.mean)) / np.float32(self.std)
        return np.repeat(values[None], 3, axis=0)


def read_medclip_images(raw: Mapping[str, Any], where: str, side: int) -> MedclipImages:
    """Settings from a parsed preprocessor_config.json for a tower of `side` pixels.

    Raises `InputRefused` naming `where` on wrong types and on settings of another kind of processor.
    """
    try:
        if raw.get("image_processor_type") != PROCESSOR:
            raise ValueError(f"image_processor_type is {raw.get('image_processor_type')!r}")
        mean, std = float(raw["image_mean"]), float(raw["image_std"])
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"image_mean is {mean}, image_std {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those that merging "
            f"a MedCLIP checkpoint writes ({PROCESSOR})"
        ) from error
    return MedclipImages(side, mean, std)
