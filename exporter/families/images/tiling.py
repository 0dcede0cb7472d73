"""Image tiles of Idefics3 and SmolVLM with Pillow and numpy: no torch, no transformers.

Computes bit for bit what transformers' ``Idefics3ImageProcessorPil`` and ``SmolVLMImageProcessorPil``
(5.x, the same code twice) compute: longest edge to `longest_edge`, both edges up to multiples of the
tile, the tiles row by row, then the whole image once more as one tile.

A tile whose normalised values are all exactly 0 (black, when the mean is 0) is kept: torch's model
takes it for batch padding, drops it and then fails on the number of image tokens.
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
from exporter.families.images.pixels import Normalisation, edge, read_normalisation, resized

MAX_EDGE = 4096
MAX_PIXELS = 8192 * 8192


@dataclass(frozen=True)
class TilingSettings:
    """The keys of preprocessor_config.json that matter.

    `size` is the longest edge in pixels, or (height, width); `tile` the edge of a tile in pixels;
    `resample` Pillow's filter number.
    """

    size: int | tuple[int, int]
    tile: int
    resample: int
    resize: bool
    split: bool
    normalisation: Normalisation


@dataclass(frozen=True)
class Tiles:
    """pixel_values: float32 ``[rows * cols + 1, 3, tile, tile]``; rows and cols are 0 when unsplit."""

    pixel_values: NDArray[np.float32]
    rows: int
    cols: int


def read_settings(raw: Mapping[str, Any], where: str) -> TilingSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take transformers' defaults.

    Raises `InputRefused` naming `where` on wrong types or sizes that no image could have.
    """
    try:
        size = {"longest_edge": 4 * 364} if raw.get("size") is None else raw["size"]
        tile = {"longest_edge": 364} if raw.get("max_image_size") is None else raw["max_image_size"]
        return TilingSettings(
            size=edge(size["longest_edge"])
            if size.get("longest_edge")
            else (edge(size["height"]), edge(size["width"])),
            tile=edge(tile["longest_edge"]),
            resample=int(Image.Resampling(raw.get("resample", Image.Resampling.LANCZOS))),
            resize=bool(raw.get("do_resize", True)),
            split=bool(raw.get("do_image_splitting", True)),
            normalisation=read_normalisation(raw, 0.5, 0.5),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those of an "
            "Idefics3 image processor"
        ) from error


def split_image(image: Image.Image, settings: TilingSettings) -> Tiles:
    """Tiles of one image of any Pillow mode; transparency is put on white.

    An unsplit image is one tile. Without splitting the image is squeezed to one square tile.
    Raises `InputRefused` when the tiles would hold more than `MAX_PIXELS` (only without resizing).
    """
    picture = to_rgb(image)
    if settings.resize:
        picture = resized(picture, *_first_size(picture, settings), settings.resample)
    if not settings.split:
        square = resized(picture, settings.tile, settings.tile, settings.resample)
        return Tiles(settings.normalisation.apply([square]), 0, 0)
    picture = resized(picture, *_whole_tiles(picture, settings.tile), settings.resample)
    rows, cols = picture.height // settings.tile, picture.width // settings.tile
    if rows == 1 and cols == 1:
        return Tiles(settings.normalisation.apply([picture]), 0, 0)
    boxes = [(c * settings.tile, r * settings.tile) for r in range(rows) for c in range(cols)]
    frames = [picture.crop((x, y, x + settings.tile, y + settings.tile)) for x, y in boxes]
    frames.append(resized(picture, settings.tile, settings.tile, settings.resample))
    return Tiles(settings.normalisation.apply(frames), rows, cols)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, transparent parts composed onto white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _first_size(image: Image.Image, settings: TilingSettings) -> tuple[int, int]:
    """(height, width) after scaling to the longest edge; the short edge is rounded up to even."""
    if isinstance(settings.size, tuple):
        return settings.size
    aspect = image.width / image.height
    if image.width >= image.height:
        width = settings.size
        height = _even(int(width / aspect))
    else:
        height = settings.size
        width = _even(int(height * aspect))
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        height, width = int(MAX_EDGE / aspect), MAX_EDGE
    elif height > width and height > MAX_EDGE:
        height, width = MAX_EDGE, int(MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)


def _whole_tiles(image: Image.Image, tile: int) -> tuple[int, int]:
    """(height, width) as multiples of the tile; transformers fails where an edge would become 0."""
    aspect = image.width / image.height
    if image.width >= image.height:
        width = math.ceil(image.width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(image.height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    height, width = max(height, tile), max(width, tile)
    if height * width > MAX_PIXELS:
        raise InputRefused(
            f"image of {image.width} x {image.height} pixels would need {width} x {height} in whole tiles; "
            f"expected at most {MAX_PIXELS} pixels, scale it down"
        )
    return height, width


def _even(length: int) -> int:
    return length + length % 2
