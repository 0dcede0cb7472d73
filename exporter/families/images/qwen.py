"""Images of Qwen2-VL and Qwen2.5-VL with Pillow and numpy: no torch, no transformers.

Computes bit for bit what transformers' ``Qwen2VLImageProcessorPil`` (5.x) computes: both edges to
the nearest multiples of a feature row's pixels, the area between two bounds, then patches in the
order in which the model merges them.
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
from exporter.families.images.pixels import Normalisation, read_normalisation, resized
from exporter.families.images.tiling import to_rgb
from exporter.families.specs.qwen_vision import CHANNELS, FRAMES, QwenVisionSpec

# Colours of CLIP's training images, and sizes: the defaults of transformers' class.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SMALLEST, LARGEST = 56 * 56, 28 * 28 * 1280
MAX_RATIO = 200


@dataclass(frozen=True)
class QwenImageSettings:
    """The keys of preprocessor_config.json that matter; `smallest` and `largest` area in pixels."""

    smallest: int
    largest: int
    resize: bool
    resample: int
    normalisation: Normalisation


def read_settings(raw: Mapping[str, Any], where: str, spec: QwenVisionSpec) -> QwenImageSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take transformers' defaults.

    Published files allow 16384 feature rows an image, in which attention over all patches takes
    minutes on a CPU: larger images are shrunk to `LARGEST`, the default of transformers' class (1280
    rows at 28 pixels). Raises `InputRefused` naming `where` on wrong types, and on sizes other than
    the model's.
    """
    try:
        size = dict(raw.get("size") or {})
        smallest = _area(raw.get("min_pixels") or size.get("shortest_edge") or SMALLEST)
        largest = _area(raw.get("max_pixels") or size.get("longest_edge") or LARGEST)
        sizes = tuple(
            int(raw.get(key) or default)
            for key, default in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2))
        )
        settings = QwenImageSettings(
            smallest=min(smallest, LARGEST),
            largest=min(largest, LARGEST),
            resize=bool(raw.get("do_resize", True)),
            resample=int(Image.Resampling(raw.get("resample", Image.Resampling.BICUBIC))),
            normalisation=read_normalisation(raw, MEAN, STD),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those of a "
            "Qwen2-VL image processor"
        ) from error
    if sizes != (spec.patch_size, spec.merge, FRAMES):
        raise InputRefused(
            f"{where}: patch, merge and temporal patch size are {sizes}; config.json's vision part has "
            f"{(spec.patch_size, spec.merge, FRAMES)}"
        )
    if settings.smallest > settings.largest:
        raise InputRefused(
            f"{where}: at least {smallest} and at most {largest} pixels; expected bounds in order"
        )
    return settings


def image_patches(
    image: Image.Image, settings: QwenImageSettings, spec: QwenVisionSpec
) -> tuple[NDArray[np.float32], int, int]:
    """Patches ``[height * width, patch_values]`` of an image of any Pillow mode, height and width.

    Raises `InputRefused` for an image 200 times as long as wide, or not resized and of other edges
    than whole feature rows.
    """
    picture = to_rgb(image)
    factor = spec.patch_size * spec.merge
    if settings.resize:
        picture = resized(picture, *target_size(picture, factor, settings), settings.resample)
    elif picture.width % factor or picture.height % factor:
        raise InputRefused(
            f"image of {picture.width} x {picture.height} pixels; the model's settings do not resize, "
            f"expected multiples of {factor}"
        )
    pixels = settings.normalisation.apply([picture])[0]
    height, width = picture.height // spec.patch_size, picture.width // spec.patch_size
    m, p = spec.merge, spec.patch_size
    cut = pixels.reshape(CHANNELS, height // m, m, p, width // m, m, p)
    cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    frames = np.broadcast_to(cut, (*cut.shape[:5], FRAMES, p, p))
    return frames.reshape(height * width, spec.patch_values), height, width


def target_size(image: Image.Image, factor: int, settings: QwenImageSettings) -> tuple[int, int]:
    """(height, width) in pixels: multiples of `factor`, the area within the bounds."""
    height, width = image.height, image.width
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputRefused(
            f"image of {width} x {height} pixels; expected at most {MAX_RATIO} times as long as wide"
        )
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > settings.largest:
        shrink = math.sqrt(height * width / settings.largest)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < settings.smallest:
        grow = math.sqrt(settings.smallest / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def _area(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} pixels; expected a positive integer")
    return value
