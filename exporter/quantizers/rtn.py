"""Round to nearest in blocks, with the range of each block clipped where that lowers its error.

Plain rounding spreads the codes over a block's whole range (as onnxruntime's quantizer does); one
outlier then coarsens all others. The search shrinks both ends of the range over a grid, keeps the
pair with the least squared error, and refits the scale to the codes by least squares. Scales are
rounded to float16, the stored type, before an error is taken, so that what is minimised is the
error of what a runtime will compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.core.errors import InputRefused
from exporter.quantizers.packing import check_format, pack

Array = NDArray[np.float32]

# Values per chunk: small enough for the last cache, large enough that two threads rarely meet in
# the interpreter between two numpy calls.
CHUNK = 1 << 19
# Fractions of the range that the search tries: first for both ends alike, then end by end. Seven
# tries come within 0.4 % of the error of all 144 pairs between 0.5 and 1.05.
SHRINKS = (0.92, 0.84, 0.76)
STEPS = (0.08, -0.08)
TINIEST = np.float32(2.0**-24)
SMALLEST_NORMAL = np.float32(2.0**-14)
MAX_FLOAT16 = np.float32(65504.0)
HALF = np.float32(0.5)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A packed matrix and what it lost: ``|W - Q|**2`` and ``|W|**2`` summed over all values."""

    packed: PackedMatrix
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the matrix; 0 for an all-zero matrix."""
        return float(np.sqrt(self.squared_error / self.squared_norm)) if self.squared_norm else 0.0


@dataclass(frozen=True)
class _Grid:
    """A quantization grid per block, all arrays ``[M]``.

    The scale, its reciprocal (0 for scale 0), the least and greatest code relative to the zero point.
    """

    scale: Array
    inverse: Array
    low: Array
    high: Array


def quantize_matrix(
    w: NDArray[Any], fmt: BlockFormat, *, search: bool, name: str = "matrix"
) -> PackedMatrix:
    """Quantize a float ``[N, K]`` matrix in blocks along K.

    `search` clips by squared error; without it the codes are those of plain rounding. Raises
    `InputRefused` naming `name` when a value is NaN, infinite, or needs a scale beyond float16.
    """
    parts = [
        quantize_rows(w[rows], fmt, search=search, name=name)
        for rows in row_chunks(w.shape[0], w.shape[1], fmt.block)
    ]
    return join_rows(parts).packed


def row_chunks(rows: int, columns: int, block: int) -> list[slice]:
    """Cut a ``[rows, columns]`` matrix into pieces of about `CHUNK` values; at least one."""
    step = max(1, CHUNK // (-(-columns // block) * block))
    return [slice(start, min(rows, start + step)) for start in range(0, max(rows, 1), step)]


def join_rows(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """One matrix from its consecutive pieces (at least one)."""
    packed = [p.packed for p in parts]
    zeros = [p.zero_points for p in packed if p.zero_points is not None]
    matrix = replace(
        packed[0],
        qdata=np.concatenate([p.qdata for p in packed]),
        scales=np.concatenate([p.scales for p in packed]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )
    return QuantizedMatrix(
        matrix, sum(p.squared_error for p in parts), sum(p.squared_norm for p in parts)
    )


def quantize_rows(
    w: NDArray[Any], fmt: BlockFormat, *, search: bool, name: str = "matrix"
) -> QuantizedMatrix:
    """As `quantize_matrix`, at once (memory: about four float32 copies of `w`), with the error."""
    check_format(fmt)
    rows, columns = w.shape
    blocks = -(-columns // fmt.block)
    if columns != blocks * fmt.block:
        padded = np.zeros((rows, blocks * fmt.block), np.float32)
        padded[:, :columns] = w
        w = padded
    # Blocks side by side: every step below then runs along a long contiguous axis.
    values = np.ascontiguousarray(w.reshape(-1, fmt.block).T, np.float32)
    data = _Blocks(values)
    grid, bottom, top = _plain_grid(values, fmt, name)
    error = data.squared_error(grid)
    if search:
        grid, error = _searched(data, fmt, grid, error, bottom, top)
    # `low` is minus the zero point, so subtracting it makes the codes unsigned.
    codes = (data.codes(grid) - grid.low).astype(np.uint8)
    packed = pack(
        np.ascontiguousarray(codes.T).reshape(rows, blocks, fmt.block),
        grid.scale.astype(np.float16).reshape(rows, blocks),
        None if fmt.symmetric else (-grid.low).astype(np.uint8).reshape(rows, blocks),
        fmt,
        columns,
    )
    norm = np.einsum("km,km->m", values, values)
    return QuantizedMatrix(packed, float(error.sum(dtype="f8")), float(norm.sum(dtype="f8")))


def _plain_grid(values: Array, fmt: BlockFormat, name: str) -> tuple[_Grid, Array, Array]:
    """The grid over the full range, and the range's ends (zero always inside), each ``[M]``."""
    bottom = np.minimum(values.min(axis=0), 0)
    top = np.maximum(values.max(axis=0), 0)
    if not (np.isfinite(bottom).all() and np.isfinite(top).all()):
        raise InputRefused(
            f"tensor '{name}' holds NaN or infinite values; expected finite weights, "
            "look for an overflow in training or conversion"
        )
    grid = _grid(bottom, top, fmt)
    if grid.scale.max() > MAX_FLOAT16:
        raise InputRefused(
            f"tensor '{name}' holds values up to {max(top.max(), -bottom.min()):.3g}; "
            "expected block scales within float16"
        )
    return grid, bottom, top


def _grid(bottom: Array, top: Array, fmt: BlockFormat) -> _Grid:
    """The grid whose codes reach from `bottom` (not above 0) to `top` (not below 0)."""
    middle = np.float32(fmt.middle)
    if fmt.symmetric:
        # Never negative: DequantizeLinear of other runtimes wants positive scales.
        scale, inverse = _stored(np.maximum(bottom / -middle, top / (middle - 1)))
        return _Grid(scale, inverse, np.full_like(scale, -middle), np.full_like(scale, middle - 1))
    last = np.float32(fmt.top)
    scale, inverse = _stored((top - bottom) / last)
    low = np.ceil(bottom * inverse - HALF)
    np.maximum(low, -last, out=low)
    return _Grid(scale, inverse, low, low + last)


def _stored(scale: Array) -> tuple[Array, Array]:
    """Scales as float16 will hold them (positive ones never become 0), and their reciprocals."""
    kept = np.where(scale < SMALLEST_NORMAL, _multiple_of_tiniest(scale), _eleven_bits(scale))
    inverse = np.divide(1, kept, out=np.zeros_like(kept), where=kept > 0)
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


class _Blocks:
    """Blocks ``[block, M]`` side by side, with the scratch memory that every try of a grid reuses."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self._exact = np.empty_like(values)
        self._codes = np.empty_like(values)

    def codes(self, grid: _Grid) -> Array:
        """Codes relative to the zero point; overwritten by the next call."""
        np.multiply(self.values, grid.inverse, out=self._exact)
        np.rint(self._exact, out=self._codes)
        np.maximum(self._codes, grid.low, out=self._codes)
        return np.minimum(self._codes, grid.high, out=self._codes)

    def squared_error(self, grid: _Grid) -> Array:
        """Squared error of each block ``[M]``."""
        codes = self.codes(grid)
        np.subtract(codes, self._exact, out=codes)
        np.multiply(codes, codes, out=codes)
        return np.asarray(codes.sum(axis=0) * (grid.scale * grid.scale), np.float32)


def _searched(
    data: _Blocks, fmt: BlockFormat, grid: _Grid, error: Array, bottom: Array, top: Array
) -> tuple[_Grid, Array]:
    """The best grid per block over clipped ranges and refitted scales, with its error."""
    one = np.ones_like(bottom)
    low, high = one, one  # fraction of each end that the best grid keeps

    def attempt(down: Array, up: Array) -> None:
        nonlocal grid, error, low, high
        tried = _grid(bottom * down, top * up, fmt)
        found = data.squared_error(tried)
        better = found < error
        low, high = np.where(better, down, low), np.where(better, up, high)
        grid, error = _merged(better, tried, grid), np.where(better, found, error)

    for shrink in SHRINKS:
        attempt(one * np.float32(shrink), one * np.float32(shrink))
    if not fmt.symmetric:
        for step in STEPS:
            attempt(low + np.float32(step), high)
            attempt(low, high + np.float32(step))
    return _refitted(data, grid, error)


def _refitted(data: _Blocks, grid: _Grid, error: Array) -> tuple[_Grid, Array]:
    """Replace the scale by the least-squares one for the codes, where that lowers the error."""
    codes = data.codes(grid)
    square = np.einsum("km,km->m", codes, codes)
    fit = np.einsum("km,km->m", codes, data.values)
    wanted = np.divide(fit, square, out=grid.scale.copy(), where=square > 0)
    scale, inverse = _stored(np.maximum(wanted, 0))
    tried = replace(grid, scale=scale, inverse=inverse)
    found = data.squared_error(tried)
    better = found < error
    return _merged(better, tried, grid), np.where(better, found, error)


def _merged(better: NDArray[np.bool_], new: _Grid, old: _Grid) -> _Grid:
    return _Grid(
        np.where(better, new.scale, old.scale),
        np.where(better, new.inverse, old.inverse),
        np.where(better, new.low, old.low),
        np.where(better, new.high, old.high),
    )
