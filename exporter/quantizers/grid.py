"""Quantization grids per block, and the search for the grid that loses least.

Plain rounding spreads the codes over a block's whole range (as onnxruntime's quantizer does); one
outlier then coarsens all others. The search shrinks both ends of the range over a grid, keeps the
pair with the least squared error, and refits the scale to the codes by least squares. Symmetric
blocks may get a negative scale, which puts the one code that only one side has (-8 of 4 bits) on the
side of the larger values; a format with positive scales alone forgoes that. Scales are rounded to float16, the stored type, before an error is taken,
so that what is minimised is the error of what a runtime will compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused
from exporter.quantizers.products import product

Array = NDArray[np.float32]

# Fractions of the range that the search tries: first for both ends alike, then end by end. Seven
# tries come within 0.4 % of the error of all 144 pairs between 0.5 and 1.05.
SHRINKS = (0.92, 0.84, 0.76)
STEPS = (0.08, -0.08)
TINIEST = np.float32(2.0**-24)
SMALLEST_NORMAL = np.float32(2.0**-14)
MAX_FLOAT16 = np.float32(65504.0)
HALF = np.float32(0.5)


@dataclass(frozen=True)
class Grid:
    """A quantization grid per block, all arrays ``[M]``.

    The scale, its reciprocal (0 for scale 0), the least and greatest code relative to the zero point.
    """

    scale: Array
    inverse: Array
    low: Array
    high: Array

    def chosen(self, mask: NDArray[np.bool_], other: Grid) -> Grid:
        """Self where `mask` ``[M]``, elsewhere the other."""
        return Grid(
            np.where(mask, self.scale, other.scale),
            np.where(mask, self.inverse, other.inverse),
            np.where(mask, self.low, other.low),
            np.where(mask, self.high, other.high),
        )


class Blocks:
    """Blocks ``[block, M]`` side by side, with the scratch memory that every try of a grid reuses.

    `metric` says what a block's error ``e`` costs: its squares (None), squares weighted by a
    vector ``[block]``, or ``e^T metric e`` for a matrix ``[block, block]``.
    """

    def __init__(self, values: Array, metric: Array | None = None) -> None:
        self.values = values
        self._metric = metric
        self._exact = np.empty_like(values)
        self._codes = np.empty_like(values)

    def codes(self, grid: Grid) -> Array:
        """Codes relative to the zero point; overwritten by the next call."""
        np.multiply(self.values, grid.inverse, out=self._exact)
        np.rint(self._exact, out=self._codes)
        np.maximum(self._codes, grid.low, out=self._codes)
        return np.minimum(self._codes, grid.high, out=self._codes)

    def error(self, grid: Grid) -> Array:
        """What each block loses ``[M]``."""
        codes = self.codes(grid)
        np.subtract(codes, self._exact, out=codes)
        if self._metric is None:
            np.multiply(codes, codes, out=codes)
        else:
            np.multiply(codes, self._measured(codes), out=codes)
        return np.asarray(codes.sum(axis=0) * (grid.scale * grid.scale), np.float32)

    def fitted(self, grid: Grid) -> Array:
        """The scale ``[M]`` that loses least for the codes of `grid`; its own where all are 0."""
        codes = self.codes(grid)
        measured = codes if self._metric is None else self._measured(codes)
        square = np.einsum("km,km->m", codes, measured)
        fit = np.einsum("km,km->m", measured, self.values)
        wanted: Array = np.divide(fit, square, out=grid.scale.copy(), where=square > 0)
        return wanted

    def _measured(self, x: Array) -> Array:
        if self._metric is None:
            return x
        if self._metric.ndim == 1:
            return np.asarray(self._metric[:, None] * x, np.float32)
        return np.asarray(product(self._metric, x), np.float32)


def best_grid(
    data: Blocks, fmt: BlockFormat, *, search: bool, name: str = "matrix"
) -> tuple[Grid, Array]:
    """The grid of each block and what it loses, both ``[M]``; `search` clips where that loses less.

    Raises `InputRefused` naming `name` when a value is NaN, infinite, or needs a scale beyond float16.
    """
    grid, bottom, top = _plain_grid(data.values, fmt, name)
    error = data.error(grid)
    return _searched(data, fmt, grid, error, bottom, top) if search else (grid, error)


def _plain_grid(values: Array, fmt: BlockFormat, name: str) -> tuple[Grid, Array, Array]:
    """The grid over the full range, and the range's ends (zero always inside), each ``[M]``."""
    bottom = np.minimum(values.min(axis=0), 0)
    top = np.maximum(values.max(axis=0), 0)
    if not (np.isfinite(bottom).all() and np.isfinite(top).all()):
        raise InputRefused(
            f"tensor '{name}' holds NaN or infinite values; expected finite weights, "
            "look for an overflow in training or conversion"
        )
    grid = grid_between(bottom, top, fmt)
    if grid.scale.max() > MAX_FLOAT16:
        raise InputRefused(
            f"tensor '{name}' holds values up to {max(top.max(), -bottom.min()):.3g}; "
            "expected block scales within float16"
        )
    return grid, bottom, top


def grid_between(bottom: Array, top: Array, fmt: BlockFormat) -> Grid:
    """The grid whose codes reach from `bottom` (not above 0) to `top` (not below 0)."""
    middle = np.float32(fmt.middle)
    if fmt.symmetric:
        return _around_zero(np.maximum(bottom / -middle, top / (middle - 1)), fmt)
    last = np.float32(fmt.top)
    scale, inverse = stored((top - bottom) / last)
    low = np.ceil(bottom * inverse - HALF)
    np.maximum(low, -last, out=low)
    return Grid(scale, inverse, low, low + last)


def _around_zero(scale: Array, fmt: BlockFormat) -> Grid:
    """The symmetric grid of a scale; a negative one has its least code at the top."""
    middle = np.float32(fmt.middle)
    kept, inverse = stored(scale)
    return Grid(kept, inverse, np.full_like(kept, -middle), np.full_like(kept, middle - 1))


def stored(scale: Array) -> tuple[Array, Array]:
    """Scales as float16 will hold them (only 0 becomes 0), and their reciprocals (0 for 0)."""
    size = np.abs(scale)
    kept = np.where(size < SMALLEST_NORMAL, _multiple_of_tiniest(size), _eleven_bits(size))
    kept = np.copysign(kept, scale)
    inverse = np.divide(1, kept, out=np.zeros_like(kept), where=kept != 0)
    return kept, inverse


# Numpy's own float16 conversion is scalar and would take most of the search's time.
def _eleven_bits(x: Array) -> Array:
    """Round to the 11 significant bits of a normal float16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x0FFF + (bits >> 13 & 1))) & np.uint32(0xFFFFE000)
    return np.asarray(rounded, np.uint32).view(np.float32)


def _multiple_of_tiniest(x: Array) -> Array:
    """Round a subnormal float16 to its grid, but no positive value to 0."""
    shift = np.float32(0.75)  # from 0.5 to 1 float32 is spaced as subnormal float16 is
    rounded = (x + shift) - shift
    return np.asarray(np.maximum(rounded, np.minimum(TINIEST, x * np.float32(2.0**24))))


def _searched(
    data: Blocks, fmt: BlockFormat, grid: Grid, error: Array, bottom: Array, top: Array
) -> tuple[Grid, Array]:
    """The best grid per block over clipped ranges and refitted scales, with its error."""
    find = _search_signs if fmt.symmetric else _search_ends
    return _refitted(data, *find(data, fmt, grid, error, bottom, top))


def _search_ends(
    data: Blocks, fmt: BlockFormat, grid: Grid, error: Array, bottom: Array, top: Array
) -> tuple[Grid, Array]:
    """Both ends of the range shrunk alike, then each by itself."""
    one = np.ones_like(bottom)
    low, high = one, one  # fraction of each end that the best grid keeps

    def attempt(down: Array, up: Array) -> None:
        nonlocal grid, error, low, high
        tried = grid_between(bottom * down, top * up, fmt)
        found = data.error(tried)
        better = found < error
        low, high = np.where(better, down, low), np.where(better, up, high)
        grid, error = tried.chosen(better, grid), np.where(better, found, error)

    for shrink in SHRINKS:
        attempt(one * np.float32(shrink), one * np.float32(shrink))
    for step in STEPS:
        attempt(low + np.float32(step), high)
        attempt(low, high + np.float32(step))
    return grid, error


def _search_signs(
    data: Blocks, fmt: BlockFormat, grid: Grid, error: Array, bottom: Array, top: Array
) -> tuple[Grid, Array]:
    """Scales of the whole range and shrunk, of both signs unless `fmt` wants positive ones.

    The whole one with the least code on the larger side is onnxruntime's own grid. Among positive
    scales it may not be had, so that the one that ends with the greatest code is tried too.
    """
    unit = np.maximum(-bottom, top) / np.float32(fmt.middle)
    fractions = [1.0, *SHRINKS]
    if fmt.positive:
        fractions.insert(0, fmt.middle / (fmt.middle - 1))
    else:
        fractions = [f * sign for f in fractions for sign in (1, -1)]
    for fraction in fractions:
        tried = _around_zero(np.asarray(unit * np.float32(fraction), np.float32), fmt)
        found = data.error(tried)
        better = found < error
        grid, error = tried.chosen(better, grid), np.where(better, found, error)
    return grid, error


def _refitted(data: Blocks, grid: Grid, error: Array) -> tuple[Grid, Array]:
    """Replace the scale by the least-squares one for the codes, where that lowers the error."""
    wanted = data.fitted(grid)
    # A metric that is not diagonal can ask for a scale of 0 or of the other sign: no grid at all.
    scale, inverse = stored(np.where(wanted * grid.scale > 0, wanted, grid.scale))
    tried = replace(grid, scale=scale, inverse=inverse)
    found = data.error(tried)
    better = found < error
    return tried.chosen(better, grid), np.where(better, found, error)
