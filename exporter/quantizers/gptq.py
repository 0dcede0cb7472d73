"""GPTQ: quantize column after column, each correcting what the ones before it did to the output.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, in the form of Chee et al., arXiv 2307.13304 (theorem 6: the same codes): with
``H = R R^T`` the column j is rounded at ``w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj``, which needs no
inverse of H. A scale is chosen when the work reaches its block, from the corrected weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.core.errors import InputRefused
from exporter.quantizers.grid import Blocks, Grid, best_grid
from exporter.quantizers.hessian import Factor, Order, factorize
from exporter.quantizers.packing import check_format, pack
from exporter.quantizers.products import add_product, triangle_inverse
from exporter.quantizers.refine import refine

Array = NDArray[np.float32]
Clip = Literal["none", "plain", "hessian", "factor"]

# Rows at a time: bounds the memory (two float32 copies of them), and is the same on every machine.
ROWS = 2048


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ works.

    `damping`: fraction of the Hessian's mean diagonal that is added to it; `columns`: how many are
    worked on before the rest is corrected at once (no effect on the result but rounding);
    `order`: see `column_order`; `clip`: what the search for a block's range counts: nothing (full
    range), squared errors, those weighted by the Hessian's diagonal, or by the factor's squared
    diagonal (what an error costs after later columns have made up for it); `sweeps`: rounds of
    coordinate descent on codes and scales afterwards (each costs about as much as GPTQ itself twice;
    the first takes 9 % off the error, the second and third 2 % each).
    """

    damping: float = 0.01
    columns: int = 128
    order: Order = "groups"
    clip: Clip = "factor"
    sweeps: int = 2


@dataclass(frozen=True)
class Calibrated:
    """A packed matrix and how it came about: damping added to the Hessian, times it had to be
    raised, inputs that were always zero.
    """

    packed: PackedMatrix
    damping: float
    raised: int
    dead: int


@dataclass(frozen=True)
class Rounded:
    """Rows under work, columns in the order of work: ``[K, n]``; grids and codes per block.

    codes are relative to the zero point; values are what they stand for.
    """

    weights: Array
    values: Array
    codes: Array
    grids: list[Grid]


def gptq_matrix(
    weight: Array,
    fmt: BlockFormat,
    stats: InputStatistics,
    settings: GptqSettings | None = None,
    *,
    name: str = "matrix",
) -> Calibrated:
    """Quantize ``[N, K]`` so that the outputs for the calibrated inputs change least.

    Raises `InputRefused` naming `name` when weights or statistics are not finite or do not fit.
    """
    check_format(fmt)
    chosen = settings or GptqSettings()
    rows, columns = weight.shape
    if stats.second_moment.shape != (columns, columns):
        raise InputRefused(
            f"inputs of '{name}': second moment {list(stats.second_moment.shape)}; expected "
            f"{[columns, columns]}"
        )
    factor = factorize(stats.second_moment, fmt.block, chosen.damping, chosen.order, name)
    blocks = -(-columns // fmt.block)
    codes = np.zeros((rows, blocks * fmt.block), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    zeros = np.empty((rows, blocks), np.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        done = _round_rows(weight[part], fmt, stats, factor, chosen, name)
        if chosen.sweeps:
            refine(done, stats.second_moment, factor, chosen.sweeps)
        _store(done, factor, fmt, codes[part], scales[part], zeros[part])
    packed = pack(
        codes.reshape(rows, blocks, fmt.block),
        scales,
        None if fmt.symmetric else zeros,
        fmt,
        columns,
    )
    return Calibrated(packed, factor.damping, factor.raised, factor.dead)


def _round_rows(
    weight: Array,
    fmt: BlockFormat,
    stats: InputStatistics,
    factor: Factor,
    settings: GptqSettings,
    name: str,
) -> Rounded:
    weights = np.ascontiguousarray(weight.T[factor.order], np.float32)
    targets, values, codes = weights.copy(), np.empty_like(weights), np.empty_like(weights)
    metric = _metric(stats, factor, settings.clip)
    grids: list[Grid] = []
    for panel in _panels(factor.groups, settings.columns):
        here = slice(panel[0].start, panel[-1].stop)
        feedback = factor.feedback(here, here)
        for group in panel:
            inside = slice(group.start - here.start, group.stop - here.start)
            expected = _expected(weights[group], targets[group], feedback[inside, inside])
            data = Blocks(expected, None if metric is None else metric[group])
            grid, _ = best_grid(data, fmt, search=settings.clip != "none", name=name)
            grids.append(grid)
            for j in range(group.start, group.stop):
                codes[j] = _nearest(targets[j], grid)
                np.multiply(codes[j], grid.scale, out=values[j])
                local = j - here.start
                error = weights[j] - values[j]
                targets[j + 1 : here.stop] += feedback[local, local + 1 :, None] * error
        rest = slice(here.stop, targets.shape[0])
        if rest.start < rest.stop:
            error = weights[here] - values[here]
            add_product(targets[rest], factor.feedback(here, rest).T, error)
    return Rounded(weights, values, codes, grids)


def _expected(weights: Array, targets: Array, feedback: Array) -> Array:
    """Where a block's columns would go if none of them were rounded: what its scale must fit.

    `targets` know the errors of earlier blocks only through their own column of the factor; that
    columns of this block follow each other is undone by the inverse of its triangle.
    """
    inverse = triangle_inverse(feedback.astype("f8"), upper=True).astype(np.float32)
    expected = weights.copy()
    add_product(expected, inverse.T, targets - weights)
    return expected


def _nearest(x: Array, grid: Grid) -> Array:
    return np.asarray(np.clip(np.rint(x * grid.inverse), grid.low, grid.high), np.float32)


def _metric(stats: InputStatistics, factor: Factor, clip: Clip) -> Array | None:
    if clip == "hessian":
        return stats.second_moment.diagonal()[factor.order] + np.float32(factor.damping)
    return np.square(factor.diagonal) if clip == "factor" else None


def _panels(groups: Sequence[slice], columns: int) -> list[list[slice]]:
    """Consecutive groups of at least `columns` columns together."""
    panels: list[list[slice]] = [[]]
    for group in groups:
        if panels[-1] and panels[-1][-1].stop - panels[-1][0].start >= columns:
            panels.append([])
        panels[-1].append(group)
    return panels


def _store(
    done: Rounded,
    factor: Factor,
    fmt: BlockFormat,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zeros: NDArray[np.uint8],
) -> None:
    """Unsigned codes, scales and zero points to their places in the packed layout."""
    for group, grid in zip(factor.groups, done.grids, strict=True):
        columns = factor.order[group]
        block = int(columns.min()) // fmt.block
        codes[:, columns] = (done.codes[group] - grid.low).T.astype(np.uint8)
        scales[:, block] = grid.scale.astype(np.float16)
        zeros[:, block] = (-grid.low).astype(np.uint8)
    tail: Any = codes[:, factor.order.size :]
    if tail.shape[1]:
        tail[:] = zeros[:, -1:]  # padding stands for 0, as in plain rounding
