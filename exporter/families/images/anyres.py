"""LLaVA-NeXT's tiles of any resolution with Pillow and numpy: no torch, no transformers.

`split_anyres` computes bit for bit what transformers' ``LlavaNextImageProcessorPil`` (5.x) computes:
the whole image squeezed to one tile, then the image fitted into the best of the grid's resolutions
on black, cut into tiles row by row. `feature_index` is ``LlavaNextModel.pack_image_features`` as row
numbers: the first tile's rows, then those of the others line by line without the padding, each line
followed by the learned newline.
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
from exporter.families.images.clip import read_clip_settings
from exporter.families.images.pixels import Normalisation, edge, resized

GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MAX_TILES = 64

Size = tuple[int, int]


@dataclass(frozen=True)
class AnyresSettings:
    """The keys of preprocessor_config.json that matter: `tile` is an edge in pixels, `grid` the
    resolutions (height, width) in pixels, multiples of the tile.
    """

    tile: int
    grid: tuple[Size, ...]
    resample: int
    normalisation: Normalisation


def read_anyres_settings(raw: Mapping[str, Any], where: str) -> AnyresSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take transformers' defaults.

    Raises `InputRefused` naming `where` on wrong types, tiles that would be resized once more, or a
    grid that is not made of whole tiles.
    """
    clip = read_clip_settings(raw, where)
    tile = clip.crop[0] if clip.crop else clip.size if isinstance(clip.size, int) else None
    if tile is None or (clip.crop or (tile, tile)) != (tile, tile):
        raise InputRefused(f"{where}: crop_size is {raw.get('crop_size')!r}; expected a square")
    if clip.size not in (None, tile, (tile, tile)):
        raise InputRefused(
            f"{where}: size is {raw.get('size')!r} for tiles of {tile} pixels; expected the tile's own"
        )
    return AnyresSettings(
        tile, read_grid(raw, "image_grid_pinpoints", tile, where), clip.resample, clip.normalisation
    )


def read_grid(raw: Mapping[str, Any], key: str, tile: int, where: str) -> tuple[Size, ...]:
    """Resolutions (height, width) at `key`, by default the published ones. Raises `InputRefused`."""
    value = GRID if raw.get(key) is None else raw[key]
    try:
        grid = tuple((edge(height), edge(width)) for height, width in value)
    except (TypeError, ValueError) as error:
        raise InputRefused(f"{where}: {key} is {value!r:.80}; expected pairs of pixels") from error
    tiles = [(h // tile) * (w // tile) for h, w in grid]
    if not grid or any(h % tile or w % tile for h, w in grid) or max(tiles) > MAX_TILES:
        raise InputRefused(
            f"{where}: {key} is {list(grid)!r:.80}; expected multiples of {tile} pixels, at most "
            f"{MAX_TILES} tiles each"
        )
    return grid


def config_grid(config: Mapping[str, Any], tile: int) -> tuple[Size, ...]:
    """The grid of a parsed config.json, for tiles of `tile` pixels. Raises `InputRefused`."""
    return read_grid(config, "image_grid_pinpoints", tile, "config.json")


def best_resolution(size: Size, grid: Sequence[Size]) -> Size:
    """The (height, width) of `grid` that keeps most of an image of `size` (height, width)'s pixels.

    Among equals the one that wastes least, then the first.
    """
    height, width = size
    most, best = (0, -math.inf), grid[0]
    for tall, wide in grid:
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if (kept, kept - tall * wide) > most:
            most, best = (kept, kept - tall * wide), (tall, wide)
    return best


def split_anyres(image: Image.Image, settings: AnyresSettings) -> NDArray[np.float32]:
    """Pixel values ``[1 + tiles, 3, tile, tile]`` of an image of any Pillow mode."""
    picture, tile = image.convert("RGB"), settings.tile
    height, width = best_resolution((picture.height, picture.width), settings.grid)
    canvas = Image.new("RGB", (width, height))
    fitted = _fitted(picture, height, width, settings.resample)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
    frames = [resized(picture, tile, tile, settings.resample)]
    frames += [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return settings.normalisation.apply(frames)


def feature_index(
    size: Size, grid: Sequence[Size], tile: int, patches: int
) -> tuple[int, NDArray[np.int64]]:
    """Number of tiles of an image of `size` (height, width), and which rows stand for it.

    The rows int64 ``[rows]`` count through ``patches x patches`` rows of each tile, the whole image's
    first, and the newline behind the last one.
    """
    height, width = best_resolution(size, grid)
    rows, cols = height // tile, width // tile
    tiles, square = 1 + rows * cols, patches * patches
    places = np.arange(square, tiles * square).reshape(rows, cols, patches, patches)
    lines = places.transpose(0, 2, 1, 3).reshape(rows * patches, cols * patches)
    lines = _unpadded(lines, size)
    newline = np.full((len(lines), 1), tiles * square)
    packed = np.concatenate([lines, newline], axis=1).reshape(-1)
    return tiles, np.concatenate([np.arange(square), packed]).astype(np.int64)


def _fitted(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """The image as large as fits into height x width, its aspect ratio kept."""
    across, down = width / image.width, height / image.height
    if across < down:
        return resized(image, min(math.ceil(image.height * across), height), width, resample)
    return resized(image, height, min(math.ceil(image.width * down), width), resample)


def _unpadded(lines: NDArray[np.int64], size: Size) -> NDArray[np.int64]:
    """`lines` without those that lie wholly in the padding, counted as transformers does."""
    height, width = size
    tall, wide = lines.shape
    if width / height > wide / tall:
        kept = int(round(height * (wide / width), 7))
        start = (tall - kept) // 2
        return lines[start : tall - start]
    kept = int(round(width * (tall / height), 7))
    start = (wide - kept) // 2
    return lines[:, start : wide - start]
