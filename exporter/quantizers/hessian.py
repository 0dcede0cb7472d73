"""The Hessian of a layer's output error: order of its columns, damping, and its triangular factor.

For inputs x with second moment H, replacing W by Q costs ``tr((W - Q) H (W - Q)^T)`` in the layer's
output. With ``H = R R^T``, R upper triangular, that is ``|(W - Q) R|**2``: a sum of one term per
column, each of which depends on that column and the ones before it only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.errors import InputRefused
from exporter.quantizers.products import add_product, lower_factor, product, triangle_inverse

Order = Literal["none", "within", "groups"]

# Up to this width the factor is computed in float64 (0.5 GB); beyond, in float32 (0.8 GB at 14336).
DOUBLE = 8192
PANEL = 256
# Up to this width outputs are measured by the second moment; beyond, by the sampled inputs.
MOMENT_COLUMNS = 4096
# When the factorization fails: at least so much of the mean diagonal, then ten times as much.
LEAST, RAISE, ATTEMPTS = 1e-6, 10.0, 8


@dataclass(frozen=True)
class Factor:
    """``H[order][:, order] + damping I = R R^T`` with R upper triangular.

    `groups`: the slices of `order` that are blocks of the packed layout, in the order of work;
    `damping` is what was added to the diagonal, `raised` how often more was needed than asked for,
    `dead` the number of inputs that were zero throughout.
    """

    order: NDArray[np.intp]
    groups: tuple[slice, ...]
    diagonal: NDArray[np.float32]
    damping: float
    raised: int
    dead: int
    lower: NDArray[Any]

    def feedback(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """Part of R with each column divided by its diagonal entry, float32 and contiguous."""
        part = self.lower[::-1, ::-1][rows, columns]
        return np.ascontiguousarray(part / self.diagonal[columns], np.float32)


def column_order(
    diagonal: NDArray[np.float32], block: int, order: Order
) -> tuple[NDArray[np.intp], tuple[slice, ...]]:
    """The order in which columns are quantized, and the slices of it that are whole blocks.

    Blocks stay together, so that the packed layout needs no index of its own. "within" takes the
    columns of each block by falling `diagonal` (GPTQ's activation order inside blocks); "groups"
    also takes the blocks by falling mean of it.
    """
    columns = diagonal.size
    starts = list(range(0, columns, block))
    if order == "groups":
        means = np.array([diagonal[s : s + block].mean() for s in starts])
        starts = [starts[i] for i in np.argsort(-means, kind="stable")]
    found, slices, begin = [], [], 0
    for start in starts:
        indices = np.arange(start, min(start + block, columns))
        if order != "none":
            indices = indices[np.argsort(-diagonal[indices], kind="stable")]
        found.append(indices)
        slices.append(slice(begin, begin + indices.size))
        begin += indices.size
    return np.concatenate(found), tuple(slices)


def factorize(
    moment: NDArray[np.float32], block: int, damping: float, order: Order, name: str = "matrix"
) -> Factor:
    """The factor of a second moment ``[K, K]`` after `damping` times its mean diagonal was added.

    Where that is not positive definite, ten times as much is added, up to eight times over. Memory:
    one copy of the moment, float64 up to `DOUBLE` columns. Raises `InputRefused` naming `name` when
    the moment is not finite or no damping helps.
    """
    diagonal = np.ascontiguousarray(moment.diagonal(), np.float32)
    mean = float(diagonal.mean(dtype="f8"))
    if not np.isfinite(mean) or diagonal.min() < 0:
        raise InputRefused(
            f"inputs of '{name}': their second moment is not finite or has a negative diagonal; "
            "look for an overflow in the calibration run"
        )
    permuted, groups = column_order(diagonal, block, order)
    # Reversed, because R is upper triangular: its mirror image is the usual lower factor.
    backwards = permuted[::-1]
    # Inputs that are all zero have no preference: any damping rounds each weight to the nearest.
    added = damping * mean if mean else 1.0
    for attempt in range(ATTEMPTS):
        factor = _gathered(moment, backwards)
        factor.flat[:: factor.shape[0] + 1] += added
        try:
            _cholesky(factor)
        except np.linalg.LinAlgError:
            added = max(added * RAISE, LEAST * mean)
            continue
        entries = np.ascontiguousarray(factor.diagonal()[::-1], np.float32)
        dead = int(np.count_nonzero(diagonal == 0))
        return Factor(permuted, groups, entries, added, attempt, dead, factor)
    raise InputRefused(
        f"inputs of '{name}': their second moment is singular even with {added:.3g} on its "
        "diagonal; expected statistics of real prompts"
    )


def _gathered(moment: NDArray[np.float32], order: NDArray[np.intp]) -> NDArray[Any]:
    size = order.size
    out = np.empty((size, size), np.float64 if size <= DOUBLE else np.float32)
    for start in range(0, size, PANEL):
        out[start : start + PANEL] = moment[order[start : start + PANEL]][:, order]
    return out


def _cholesky(a: NDArray[Any]) -> None:
    """Lower Cholesky factor in place of the lower half of `a`; the upper half is left as it was.

    In panels, since a library's own needs two more copies. Raises LinAlgError.
    """
    size = a.shape[0]
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = lower_factor(a[start:stop, start:stop])
        a[start:stop, start:stop] = corner
        if stop == size:
            return
        a[stop:, start:stop] = product(
            a[stop:, start:stop], triangle_inverse(corner, upper=False).T
        )
        for strip in range(stop, size, PANEL):
            beside = a[strip : strip + PANEL, start:stop]
            add_product(
                a[strip:, strip : strip + PANEL], a[strip:, start:stop], beside.T, factor=-1.0
            )


def output_error(change: NDArray[np.float32], moment: NDArray[np.float32]) -> float:
    """``tr(change H change^T)``: the mean squared output that weights ``[N, K]`` give."""
    total = 0.0
    for start in range(0, change.shape[0], 1024):
        part = change[start : start + 1024]
        total += float(np.einsum("nk,nk->", product(part, moment), part, dtype="f8"))
    return total


def mean_square(weight: NDArray[np.float32], stats: InputStatistics) -> float:
    """Mean squared output of ``[N, K]``, by the second moment, or by the sampled inputs where K is
    so large that these cost much less.
    """
    if weight.shape[1] <= MOMENT_COLUMNS or not stats.rows.size:
        return output_error(weight, stats.second_moment)
    outputs = product(stats.rows, weight.T)
    total = float(np.einsum("rn,rn->", outputs, outputs, dtype="f8"))
    return total / int(stats.rows.shape[0])
