"""HQQ: scales and zero points that fit most weights closely and let a few outliers go.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): minimises
``sum |w - (q - z) s|**p`` with p < 1 by splitting off the large errors (generalised soft threshold)
and fitting the rest by least squares, in turns. The paper fits a real zero point; here zero points
are whole numbers, as MatMulNBits stores them in fewest bytes, and the scale is fitted too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.quantizers.grid import Blocks, Grid, best_grid, stored
from exporter.quantizers.rtn import (
    QuantizedMatrix,
    join_rows,
    rounded,
    row_chunks,
    side_by_side,
)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class HqqSettings:
    """The paper's: norm `p`, first weight `beta` of the split (errors in units of the scale), its
    growth `kappa` per round, number of `rounds`.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20


def hqq_matrix(
    weight: NDArray[Any],
    fmt: BlockFormat,
    settings: HqqSettings | None = None,
    *,
    name: str = "matrix",
) -> PackedMatrix:
    """Quantize a float ``[N, K]`` matrix. Raises `InputRefused` naming `name` as plain rounding does."""
    parts = [
        hqq_rows(weight[rows], fmt, settings, name=name)
        for rows in row_chunks(weight.shape[0], weight.shape[1], fmt.block)
    ]
    return join_rows(parts).packed


def hqq_rows(
    weight: NDArray[Any],
    fmt: BlockFormat,
    settings: HqqSettings | None = None,
    *,
    name: str = "matrix",
) -> QuantizedMatrix:
    """As `hqq_matrix`, at once, with the error."""
    chosen = settings or HqqSettings()
    data = Blocks(side_by_side(weight, fmt))
    grid, _ = best_grid(data, fmt, search=False, name=name)
    clipped, _ = best_grid(data, fmt, search=True, name=name)
    cost = _cost(data, grid, chosen.p)
    grid, cost = _better(data, clipped, grid, cost, chosen.p)
    return rounded(data, _solved(data, grid, cost, fmt, chosen), fmt, weight.shape)


def _solved(data: Blocks, grid: Grid, cost: Array, fmt: BlockFormat, settings: HqqSettings) -> Grid:
    """The best grid per block that the rounds came by; never worse than the given one."""
    scale, inverse, zero = grid.scale, grid.inverse, -grid.low
    beta = settings.beta
    for _ in range(settings.rounds):
        exact = data.values * inverse
        codes = np.clip(np.rint(exact + zero), 0, fmt.top)
        split = _shrunk(exact - (codes - zero), beta, settings.p)
        if not fmt.symmetric:
            zero = np.clip(np.mean(codes - exact + split, axis=0), 0, fmt.top)
        whole = np.rint(zero)
        steps = codes - whole
        square = np.einsum("km,km->m", steps, steps)
        fit = np.einsum("km,km->m", steps, data.values - split * scale)
        wanted = np.divide(fit, square, out=scale.copy(), where=square > 0)
        scale, inverse = stored(np.where(wanted * scale > 0, wanted, scale))
        tried = Grid(scale, inverse, -whole, np.float32(fmt.top) - whole)
        grid, cost = _better(data, tried, grid, cost, settings.p)
        beta *= settings.kappa
    return grid


def _shrunk(x: Array, beta: float, p: float) -> Array:
    """The generalised soft threshold of the p-norm: small errors become 0."""
    size = np.abs(x)
    threshold = np.power(size + np.float32(1e-8), np.float32(p - 1)) * np.float32(1 / beta)
    return np.asarray(np.sign(x) * np.maximum(size - threshold, 0), np.float32)


def _cost(data: Blocks, grid: Grid, p: float) -> Array:
    lost = np.abs(data.values - data.codes(grid) * grid.scale)
    return np.asarray(np.power(lost, np.float32(p)).sum(axis=0), np.float32)


def _better(data: Blocks, new: Grid, old: Grid, old_cost: Array, p: float) -> tuple[Grid, Array]:
    cost = _cost(data, new, p)
    lower = cost < old_cost
    return new.chosen(lower, old), np.where(lower, cost, old_cost)
