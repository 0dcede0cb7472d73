"""Images of CLIP and LLaVA-1.5 with Pillow and numpy: no torch, no transformers.

Computes bit for bit what transformers' ``CLIPImageProcessorPil`` and ``LlavaImageProcessorPil`` (5.x)
compute: (padding to a square,) resizing, a crop from the middle, normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.pixels import Normalisation, edge, read_normalisation, resized

# Colours of CLIP's training images, the defaults of transformers' class.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SQUARING = "LlavaImageProcessor"
# A shortest edge makes a strip of 1 x 10000 pixels that many times longer before it is cropped.
MAX_PIXELS = 8192 * 8192


@dataclass(frozen=True)
class ClipImageSettings:
    """The keys of preprocessor_config.json that matter, in pixels; None leaves the step out.

    `size`: the shortest edge, or (height, width); `crop`: (height, width); `square`: the image is
    first padded to a square in the mean colour; `resample`: Pillow's filter number.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    square: bool
    resample: int
    normalisation: Normalisation

    def output(self) -> tuple[int, int] | None:
        """(height, width) of every prepared image; None when it depends on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)


def read_clip_settings(raw: Mapping[str, Any], where: str) -> ClipImageSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take transformers' defaults.

    Raises `InputRefused` naming `where` on wrong types or sizes that no image could have.
    """
    try:
        size = {"shortest_edge": 224} if raw.get("size") is None else raw["size"]
        crop = {"height": 224, "width": 224} if raw.get("crop_size") is None else raw["crop_size"]
        return ClipImageSettings(
            size=_size(size) if raw.get("do_resize", True) else None,
            crop=_pair(crop) if raw.get("do_center_crop", True) else None,
            # CLIP's own class has a do_pad too, which pads a batch and nothing here.
            square=raw.get("image_processor_type") == SQUARING and bool(raw.get("do_pad", False)),
            resample=int(Image.Resampling(raw.get("resample", Image.Resampling.BICUBIC))),
            normalisation=read_normalisation(raw, MEAN, STD),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those of a CLIP "
            "image processor"
        ) from error


def clip_feed(
    images: Sequence[Image.Image], settings: ClipImageSettings
) -> dict[str, NDArray[Any]]:
    """``pixel_values`` float32 ``[images, 3, height, width]``; see `clip_pixels`."""
    return {"pixel_values": np.stack([clip_pixels(image, settings) for image in images])}


def clip_pixels(image: Image.Image, settings: ClipImageSettings) -> NDArray[np.float32]:
    """Pixel values ``[3, height, width]`` of an image of any Pillow mode.

    Raises `InputRefused` for an image so long and thin that resizing its short edge explodes it.
    """
    picture = image.convert("RGB")
    if settings.square:
        picture = _squared(picture, settings.normalisation)
    if isinstance(settings.size, tuple):
        picture = resized(picture, *settings.size, settings.resample)
    elif settings.size is not None:
        picture = _shortest(picture, settings.size, settings.resample)
    if settings.crop is not None:
        picture = _cropped(picture, *settings.crop)
    pixels: NDArray[np.float32] = settings.normalisation.apply([picture])[0]
    return pixels


def _shortest(image: Image.Image, size: int, resample: int) -> Image.Image:
    short, long = sorted(image.size)
    longer = int(size * long / short)
    if size * longer > MAX_PIXELS:
        raise InputRefused(
            f"image of {image.width} x {image.height} pixels would become {size} x {longer}; expected "
            f"at most {MAX_PIXELS} pixels, crop it"
        )
    height, width = (longer, size) if image.width <= image.height else (size, longer)
    return resized(image, height, width, resample)


def _cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of the image, on black where the image is smaller than the crop."""
    top, left = (image.height - height) // 2, (image.width - width) // 2
    if top < 0 or left < 0:
        tall, wide = max(height, image.height), max(width, image.width)
        canvas = Image.new("RGB", (wide, tall))
        above, before = math.ceil((tall - image.height) / 2), math.ceil((wide - image.width) / 2)
        canvas.paste(image, (before, above))
        image, top, left = canvas, max(0, top + above), max(0, left + before)
    return image.crop((left, top, left + width, top + height))


def _squared(image: Image.Image, normalisation: Normalisation) -> Image.Image:
    """The image in the middle of a square of the mean colour."""
    side = max(image.size)
    red, green, blue = (int(c * 255) for c in normalisation.mean or (0.0, 0.0, 0.0))
    canvas = Image.new("RGB", (side, side), (red, green, blue))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _size(raw: Mapping[str, Any] | int) -> int | tuple[int, int]:
    # A plain number is an older form of the shortest edge.
    if isinstance(raw, int):
        return edge(raw)
    if raw.get("longest_edge"):
        raise ValueError("size has a longest_edge")
    return edge(raw["shortest_edge"]) if raw.get("shortest_edge") else _pair(raw)


def _pair(raw: Mapping[str, Any] | int) -> tuple[int, int]:
    if isinstance(raw, int):
        return edge(raw), edge(raw)
    return edge(raw["height"]), edge(raw["width"])
