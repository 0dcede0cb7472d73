"""The forms in which a matrix comes to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import PackedMatrix
from exporter.core.nf4 import Nf4Matrix
from exporter.core.static8 import StaticMatrix

FloatArray = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class WatchedMatrix:
    """A float matrix (or several stacked ones, by name) whose inputs become outputs of the graph."""

    names: tuple[str, ...]
    values: FloatArray


@dataclass(frozen=True)
class GatedMatrix:
    """A float matrix and the same in 8 bits; an input of the graph (0 or 1) says which is used."""

    names: tuple[str, ...]
    values: FloatArray
    static: StaticMatrix


Matrix = FloatArray | PackedMatrix | Nf4Matrix | StaticMatrix | WatchedMatrix | GatedMatrix


def take_rows(matrix: Matrix, rows: slice) -> Matrix:
    """Some rows of a float, packed or NF4 matrix, exactly.

    Raises ValueError for another form, and for rows that are no whole NF4 blocks.
    """
    if isinstance(matrix, np.ndarray):
        return matrix[rows]
    if isinstance(matrix, Nf4Matrix):
        return _take_nf4(matrix, *rows.indices(matrix.rows)[:2])
    if not isinstance(matrix, PackedMatrix):
        raise ValueError(f"rows of a {type(matrix).__name__} are not taken apart")
    zeros = None if matrix.zero_points is None else matrix.zero_points[rows]
    qdata, scales = matrix.qdata[rows], matrix.scales[rows]
    return PackedMatrix(matrix.format, matrix.columns, qdata, scales, zeros)


def _take_nf4(matrix: Nf4Matrix, first: int, last: int) -> Nf4Matrix:
    begin, end = first * matrix.columns, last * matrix.columns
    # Blocks run over the flattened matrix, two values a byte.
    if begin % matrix.block or end % matrix.block:
        raise ValueError(f"rows {first} to {last} are no whole blocks of {matrix.block}")
    blocks = slice(begin // matrix.block, end // matrix.block)
    data, absmax = matrix.data[begin // 2 : end // 2], matrix.absmax[blocks]
    return Nf4Matrix(last - first, matrix.columns, matrix.block, data, absmax)


def stack_rows(parts: Sequence[Matrix]) -> Matrix:
    """One matrix of all rows. Exact for packed parts: their blocks run along the columns.

    Raises ValueError unless all parts have one format.
    """
    if any(isinstance(p, Nf4Matrix) for p in parts):
        return _stack_nf4([p for p in parts if isinstance(p, Nf4Matrix)], len(parts))
    if any(isinstance(p, StaticMatrix) for p in parts):
        return _stack_static([p for p in parts if isinstance(p, StaticMatrix)], len(parts))
    watched = [p for p in parts if isinstance(p, WatchedMatrix)]
    gated = [p for p in parts if isinstance(p, GatedMatrix)]
    if watched or gated:
        if len(parts) not in (len(watched), len(gated)):
            raise ValueError("matrices of different formats cannot be stacked")
        both: list[WatchedMatrix | GatedMatrix] = [*watched, *gated]
        names = tuple(n for p in both for n in p.names)
        values = np.concatenate([p.values for p in both])
        if watched:
            return WatchedMatrix(names, values)
        return GatedMatrix(names, values, _stack_static([p.static for p in gated], len(gated)))
    packed = [p for p in parts if isinstance(p, PackedMatrix)]
    if not packed:
        return np.concatenate([p for p in parts if isinstance(p, np.ndarray)])
    first = packed[0]
    if len(packed) != len(parts) or any(p.format != first.format for p in packed):
        raise ValueError("matrices of different formats cannot be stacked")
    zeros = [p.zero_points for p in packed if p.zero_points is not None]
    return PackedMatrix(
        first.format,
        first.columns,
        np.concatenate([p.qdata for p in packed]),
        np.concatenate([p.scales for p in packed]),
        np.concatenate(zeros) if zeros else None,
    )


def _stack_nf4(parts: Sequence[Nf4Matrix], count: int) -> Nf4Matrix:
    # Blocks run over the flattened matrix: whole ones only stay blocks when rows are added.
    first = parts[0]
    if len(parts) != count or any(p.rows * p.columns % p.block for p in parts):
        raise ValueError("matrices of different formats, or of broken blocks, cannot be stacked")
    return Nf4Matrix(
        sum(p.rows for p in parts),
        first.columns,
        first.block,
        np.concatenate([p.data for p in parts]),
        np.concatenate([p.absmax for p in parts]),
    )


def _stack_static(parts: Sequence[StaticMatrix], count: int) -> StaticMatrix:
    first = parts[0]
    inputs = {(p.input_scale, p.input_zero) for p in parts}
    if len(parts) != count or len(inputs) != 1:
        raise ValueError("matrices of different formats, or of different inputs, cannot be stacked")
    return StaticMatrix(
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scales for p in parts]),
        first.input_scale,
        first.input_zero,
    )
