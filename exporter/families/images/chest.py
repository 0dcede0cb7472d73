"""Chest radiographs as CheXzero's code prepares them, with Pillow and numpy.

Its steps (github.com/rajpurkarlab/CheXzero at 5c341db0: data_process.py, zero_shot.py): the longest
side to 320 pixels by Pillow's Lanczos filter, in the middle of a black square; gray levels 0..255
normalised by the mean and deviation of its training set; only then resized to the tower's side by
bicubic interpolation of the normalised values, which smooths nothing when it shrinks (torchvision
0.11 on tensors: a = -0.75, edges at pixel corners); the one channel three times.
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
from exporter.families.images.pixels import edge, resized

# A name that no library has a class for: one that does not know these steps must not guess others.
CHEST_PROCESSOR = "CheXzeroImageProcessor"
CHEST_IMAGES: Mapping[str, Any] = {
    "image_processor_type": CHEST_PROCESSOR,
    "square": 320,
    "image_mean": 101.48761,
    "image_std": 83.43944,
}
# The cubic's free parameter in torch (Keys 1981 has -0.5).
CUBIC = -0.75


@dataclass(frozen=True)
class ChestSettings:
    """`square`: pixels of the square's side; `mean` and `std` on the scale 0..255."""

    square: int
    mean: float
    std: float


def read_chest_settings(raw: Mapping[str, Any], where: str) -> ChestSettings:
    """Settings from a parsed preprocessor_config.json. Raises `InputRefused` naming `where`."""
    try:
        mean, std = float(raw["image_mean"]), float(raw["image_std"])
        found = ChestSettings(edge(raw["square"]), mean, std)
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"image_mean is {mean}, image_std is {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those that merging "
            "a CheXzero checkpoint writes"
        ) from error
    return found


def chest_pixels(image: Image.Image, settings: ChestSettings, side: int) -> NDArray[np.float32]:
    """Pixel values ``[3, side, side]`` of an image of any Pillow mode."""
    gray = np.asarray(_squared(image.convert("RGB"), settings.square), np.float32)
    normal = (gray - np.float32(settings.mean)) / np.float32(settings.std)
    if side != settings.square:
        weights = cubic_weights(settings.square, side)
        normal = weights @ normal @ weights.T
    return np.repeat(normal[None], 3, axis=0)


def cubic_weights(before: int, after: int) -> NDArray[np.float32]:
    """Matrix ``[after, before]`` of a cubic interpolation without smoothing (torch's ``bicubic`` with
    align_corners false): four neighbours per value, the edge's value repeated beyond it.
    """
    # Rounded as in torch: float32 moves a place among 320 pixels by up to 2e-5 of one.
    scale = float(np.float32(before / after))
    places = (scale * (np.arange(after) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(places)
    found = np.zeros((after, before), np.float32)
    for offset in range(-1, 3):
        columns = np.clip(first + offset, 0, before - 1).astype(np.int64)
        np.add.at(found, (np.arange(after), columns), _cubic(np.abs(places - first - offset)))
    return found


def _cubic(distance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys' cubic kernel (1981) at distances 0 to 2."""
    d, a = distance, CUBIC
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, far)


def _squared(image: Image.Image, square: int) -> Image.Image:
    """The RGB image, its longest side brought to `square`, in gray in the middle of a black square."""
    ratio = square / max(image.size)
    width, height = (max(1, int(n * ratio)) for n in image.size)
    small = resized(image, height, width, Image.Resampling.LANCZOS)
    canvas = Image.new("L", (square, square))
    canvas.paste(small.convert("L"), ((square - width) // 2, (square - height) // 2))
    return canvas
