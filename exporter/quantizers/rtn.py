"""Round to nearest in blocks, with the range of each block clipped where that lowers its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.quantizers.grid import Blocks, Grid, best_grid
from exporter.quantizers.packing import check_format, pack

# Values per chunk: small enough for the last cache, large enough that two threads rarely meet in
# the interpreter between two numpy calls.
CHUNK = 1 << 19


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
    values = side_by_side(w, fmt)
    data = Blocks(values)
    grid, _ = best_grid(data, fmt, search=search, name=name)
    return rounded(data, grid, fmt, w.shape)


def side_by_side(w: NDArray[Any], fmt: BlockFormat) -> NDArray[np.float32]:
    """The blocks of ``[N, K]``, K padded with zeros, as float32 ``[block, N * blocks]``.

    Every step on them then runs along a long contiguous axis.
    """
    check_format(fmt)
    rows, columns = w.shape
    blocks = -(-columns // fmt.block)
    if columns != blocks * fmt.block:
        padded = np.zeros((rows, blocks * fmt.block), np.float32)
        padded[:, :columns] = w
        w = padded
    return np.ascontiguousarray(w.reshape(-1, fmt.block).T, np.float32)


def rounded(data: Blocks, grid: Grid, fmt: BlockFormat, shape: tuple[int, ...]) -> QuantizedMatrix:
    """The matrix ``[N, K]`` of `shape` whose blocks lie side by side in `data`, on a grid each."""
    rows, columns = shape
    blocks = -(-columns // fmt.block)
    relative = data.codes(grid)
    # `low` is minus the zero point, so subtracting it makes the codes unsigned.
    codes = (relative - grid.low).astype(np.uint8)
    packed = pack(
        np.ascontiguousarray(codes.T).reshape(rows, blocks, fmt.block),
        grid.scale.astype(np.float16).reshape(rows, blocks),
        None if fmt.symmetric else (-grid.low).astype(np.uint8).reshape(rows, blocks),
        fmt,
        columns,
    )
    lost = data.values - relative * grid.scale
    error = np.einsum("km,km->m", lost, lost)
    norm = np.einsum("km,km->m", data.values, data.values)
    return QuantizedMatrix(packed, float(error.sum(dtype="f8")), float(norm.sum(dtype="f8")))
