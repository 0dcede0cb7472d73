"""Moondream's image crops with Pillow and numpy: no torch, no transformers.

An image is seen once as a whole and once in overlapping crops. Of the patches' feature rows of a crop
its margins are dropped (but at the image's edge), the rest form one grid, which is averaged to the
size of the whole image's grid. What the vision graph does with the rows is expressed in numbers
computed here: which row stands where in the grid, and which share each row and column of the grid
has in the averages.

The published code resizes with libvips or, from 2025-05-16 on and where that is missing, with
Pillow's Lanczos filter. Here it is Pillow: bit for bit the values of that way, not those of libvips,
which moves an enlarged picture by about 0.4 of a pixel (profiles/models/moondream2.yaml).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.families.base import Feed
from exporter.families.images.pixels import Normalisation, resized

LANCZOS = int(Image.Resampling.LANCZOS)
# (pixel / 255 - 0.5) / 0.5, written down in the published code.
NORMALISATION = Normalisation(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class CropSettings:
    """`size`: edge of a crop in pixels; `margin`: patches of it that overlap, on each side;
    `max_crops`: at most as many crops, the whole image not counted.
    """

    size: int
    patch: int
    margin: int
    max_crops: int

    @property
    def grid(self) -> int:
        """Patches along an edge of a crop."""
        return self.size // self.patch

    @property
    def window(self) -> int:
        """Patches along an edge that are a crop's own."""
        return self.grid - 2 * self.margin


def tiling(height: int, width: int, window: int, limit: int) -> tuple[int, int]:
    """(rows, columns) of windows of `window` pixels for an inner area of `height` x `width` pixels.

    One where an edge fits into a window. Else as many as the limit allows at the area's shape, at
    least enough to cover it at its own resolution; where that takes more than the limit, fewer.
    """
    if height <= window or width <= window:
        return 1, 1
    least_rows, least_columns = math.ceil(height / window), math.ceil(width / window)
    if least_rows * least_columns > limit:
        share = math.sqrt(limit / (least_rows * least_columns))
        return max(1, math.floor(least_rows * share)), max(1, math.floor(least_columns * share))
    rows = max(math.floor(math.sqrt(limit * height / width)), least_rows)
    columns = max(math.floor(math.sqrt(limit * width / height)), least_columns)
    if rows * columns > limit and columns > rows:
        columns = limit // rows
    elif rows * columns > limit:
        rows = limit // columns
    return max(1, rows), max(1, columns)


def crop_image(
    image: Image.Image, settings: CropSettings
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Float32 ``[1 + rows * columns, 3, size, size]``, the whole image first, and (rows, columns)."""
    picture = image.convert("RGB")  # as published: transparency is ignored
    step, border = settings.window * settings.patch, 2 * settings.margin * settings.patch
    rows, columns = tiling(
        picture.height - border, picture.width - border, step, settings.max_crops
    )
    large = resized(picture, rows * step + border, columns * step + border, LANCZOS)
    size = settings.size
    corners = [(c * step, r * step) for r in range(rows) for c in range(columns)]
    frames = [resized(picture, size, size, LANCZOS)]
    frames += [large.crop((x, y, x + size, y + size)) for x, y in corners]
    return NORMALISATION.apply(frames), (rows, columns)


def stitch_index(settings: CropSettings, rows: int, columns: int) -> NDArray[np.int64]:
    """Which feature row stands at each place of the grid of all crops, int64 ``[height, width]``.

    Rows are counted over the crops one after the other, the whole image's first. A place that
    several crops cover belongs to the one whose window it is in, at the image's edge to the nearest.
    """
    crop_y, y = _owners(settings, rows)
    crop_x, x = _owners(settings, columns)
    crop = 1 + crop_y[:, None] * columns + crop_x[None, :]
    index: NDArray[np.int64] = (crop * settings.grid + y[:, None]) * settings.grid + x[None, :]
    return index


def averages(size: int, bins: int) -> NDArray[np.float32]:
    """Shares ``[bins, size]`` of an adaptive average: bin k is the mean of the places from
    ``floor(k * size / bins)`` to ``ceil((k + 1) * size / bins)``.
    """
    shares = np.zeros((bins, size), np.float32)
    for k in range(bins):
        first, end = k * size // bins, -(-(k + 1) * size // bins)
        shares[k, first:end] = 1 / (end - first)
    return shares


def vision_feed(image: Image.Image, settings: CropSettings) -> Feed:
    """The inputs of the vision graph for one image."""
    pixels, (rows, columns) = crop_image(image, settings)
    index = stitch_index(settings, rows, columns)
    return {
        "pixel_values": pixels[None],
        "stitch_index": index,
        "row_shares": averages(index.shape[0], settings.grid),
        "column_shares": averages(index.shape[1], settings.grid),
    }


def _owners(settings: CropSettings, crops: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Along one axis, for each place of the grid: the crop it is taken from, and its place there."""
    places = np.arange(crops * settings.window + 2 * settings.margin)
    crop = np.clip((places - settings.margin) // settings.window, 0, crops - 1)
    return crop, places - crop * settings.window
