"""Coordinate descent on codes and scales after GPTQ: each step lowers the output error or is not taken.

GPTQ never looks back: columns rounded early do not know what later ones did. With all others fixed
the best value of column j is ``q_j + (E H)_j / H_jj``, E the errors so far, and the best scale of a
block follows by least squares. (Behdin et al., "QuantEase", arXiv 2309.01885, for the codes.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.quantizers.grid import Grid, stored
from exporter.quantizers.hessian import Factor
from exporter.quantizers.products import product

Array = NDArray[np.float32]


class Work(Protocol):
    """What `refine` changes in place: columns in the order of work ``[K, n]``, a grid per block."""

    @property
    def weights(self) -> Array:
        """What is approximated."""

    @property
    def values(self) -> Array:
        """What the codes stand for."""

    @property
    def codes(self) -> Array:
        """Codes relative to the zero point."""

    @property
    def grids(self) -> list[Grid]:
        """A grid for each block, in the order of work."""


def refine(work: Work, moment: Array, factor: Factor, sweeps: int) -> None:
    """Improve codes and scales by `sweeps` passes over the blocks.

    `moment` is the undamped second moment ``[K, K]`` in the checkpoint's column order; the damping
    of `factor` counts as part of it.
    """
    errors = work.weights - work.values
    for _ in range(sweeps):
        for index, group in enumerate(factor.groups):
            columns = factor.order[group]
            rows = moment[columns][:, factor.order]
            pull = product(rows, errors) + np.float32(factor.damping) * errors[group]
            inside = np.ascontiguousarray(rows[:, group])
            inside.flat[:: inside.shape[0] + 1] += np.float32(factor.damping)
            grid = _rescaled(work.codes[group], work.grids[index], errors[group], pull, inside)
            work.grids[index] = grid
            _recode(work.codes[group], grid, errors[group], pull, inside)
            np.multiply(work.codes[group], grid.scale, out=work.values[group])
            np.subtract(work.weights[group], work.values[group], out=errors[group])


def _rescaled(codes: Array, grid: Grid, errors: Array, pull: Array, inside: Array) -> Grid:
    """The grid with the best scale for these codes; `errors` and `pull` are brought up to date."""
    weighted = product(inside, codes)
    square = np.einsum("km,km->m", codes, weighted)
    slope = np.einsum("km,km->m", codes, pull)
    step = np.divide(slope, square, out=np.zeros_like(slope), where=square > 0)
    wanted = grid.scale + step
    scale, inverse = stored(np.where(wanted * grid.scale > 0, wanted, grid.scale))
    step = scale - grid.scale
    # Change of the error by a step of the scale; rounding to float16 may have spoilt it.
    better = step * step * square < 2 * step * slope
    step = np.where(better, step, 0)
    errors -= codes * step
    pull -= weighted * step
    return replace(
        grid,
        scale=np.where(better, scale, grid.scale),
        inverse=np.where(better, inverse, grid.inverse),
    )


def _recode(codes: Array, grid: Grid, errors: Array, pull: Array, inside: Array) -> None:
    """Each column of a block in turn to its best code, `errors` and `pull` kept up to date."""
    for j in range(codes.shape[0]):
        target = codes[j] + pull[j] / inside[j, j] * grid.inverse
        best = np.clip(np.rint(target), grid.low, grid.high)
        change = (best - codes[j]) * grid.scale
        codes[j] = best
        errors[j] -= change
        pull -= inside[:, j, None] * change
