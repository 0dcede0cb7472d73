"""The numbers of a merge: float32 arithmetic, one rounding to float16 at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.adapters.targets import LoraUpdate
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint

F32 = NDArray[np.float32]
# Rows at a time: bounds the temporary copies to a few MB beside the matrix itself.
CHUNK_VALUES = 1 << 20
FLOAT16_MAX = 65504.0
EXPONENT, SIGN = np.uint16(0x7C00), np.uint16(0x8000)


@dataclass(frozen=True)
class LowRank:
    """A change ``left @ right`` of a matrix ``[rows, columns]``; DoRA's `magnitude` has one value per
    slice along `axis` of which the norm is taken (1: per row, 0: per column).
    """

    left: F32
    right: F32
    magnitude: F32 | None
    axis: int


def load_update(update: LoraUpdate, tensors: Checkpoint) -> LowRank:
    """Read a pair as ``left [rows, rank] @ right [rank, columns]`` in the layout of the base's weight."""
    a, b = tensors.float32(update.a), tensors.float32(update.b)
    magnitude = tensors.float32(update.magnitude).reshape(-1) if update.magnitude else None
    for name, values in ((update.a, a), (update.b, b), (update.magnitude, magnitude)):
        if values is not None and not np.isfinite(values).all():
            raise InputRefused(
                f"adapter tensor '{name}' holds NaN or infinity; expected finite values"
            )
    turned = update.kind in ("embedding", "conv1d")
    if turned:
        left, right = a.T, b.T
    else:
        left, right = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
    axis = 0 if turned else 1
    size = right.shape[1] if turned else left.shape[0]
    if magnitude is not None and magnitude.size != size:
        raise InputRefused(
            f"adapter tensor '{update.magnitude}' has {magnitude.size} values; expected {size}"
        )
    scaled = np.ascontiguousarray(left * np.float32(update.scaling))
    return LowRank(scaled, np.ascontiguousarray(right), magnitude, axis)


def apply_update(weight: F32, change: LowRank) -> float:
    """Add a low-rank change to `weight` (any shape, first axis rows) in place; returns ||dW|| / ||W||.

    LoRA: ``W + left right`` (arXiv 2106.09685). DoRA: that sum, rescaled to the trained magnitudes,
    ``m (W + left right) / ||W + left right||`` with the norm per output (arXiv 2402.09353).
    """
    matrix = weight.reshape(weight.shape[0], -1)
    factors = _column_factors(matrix, change) if change.axis == 0 else None
    before_sum = delta_sum = 0.0
    for rows in row_chunks(matrix.shape):
        before = matrix[rows].copy()
        after = matrix[rows]
        after += change.left[rows] @ change.right
        if factors is not None:
            after *= factors
        elif change.magnitude is not None:
            norm = np.linalg.norm(after, axis=1)
            after *= _ratio(change.magnitude[rows], norm)[:, None]
        before_sum += float(np.vdot(before, before))
        before -= after
        delta_sum += float(np.vdot(before, before))
    return float(np.sqrt(delta_sum / before_sum)) if before_sum else float("inf")


def row_chunks(shape: tuple[int, ...]) -> list[slice]:
    """Slices of the first axis with about a million values each."""
    width = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, CHUNK_VALUES // width)
    return [slice(i, i + step) for i in range(0, shape[0], step)]


def to_float16(name: str, weight: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to float16 (nearest, ties to even). Raises `InputRefused` naming a tensor that does not fit."""
    with np.errstate(over="ignore"):
        return checked(name, weight.astype(np.float16))


def checked(name: str, rounded: NDArray[np.float16]) -> NDArray[np.float16]:
    """`rounded` itself; raises `InputRefused` naming the tensor when a value is infinite or NaN."""
    # On the bits, since numpy converts every float16 it computes with.
    beyond = int(np.count_nonzero((rounded.view(np.uint16) & EXPONENT) == EXPONENT))
    if beyond:
        raise InputRefused(
            f"tensor '{name}' has {beyond} values beyond {FLOAT16_MAX:.0f} or not finite, which float16 "
            "cannot hold: the checkpoint is damaged, or it needs bfloat16 and cannot be exported"
        )
    return rounded


def count_changed(before: NDArray[np.float16], after: NDArray[np.float16]) -> int:
    """Number of finite values that differ (zero equals minus zero)."""
    a, b = before.view(np.uint16), after.view(np.uint16)
    return int(np.count_nonzero((a != b) & (((a | b) & ~SIGN) != 0)))


def _column_factors(matrix: F32, change: LowRank) -> F32 | None:
    if change.magnitude is None:
        return None
    squares = np.zeros(matrix.shape[1], np.float64)
    for rows in row_chunks(matrix.shape):
        block = (matrix[rows] + change.left[rows] @ change.right).astype(np.float64)
        squares += np.einsum("rc,rc->c", block, block)
    return _ratio(change.magnitude, np.sqrt(squares).astype(np.float32))


def _ratio(magnitude: F32, norm: F32) -> F32:
    # A zero row has no direction to rescale; the result is not finite and to_float16 names the tensor.
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude / norm).astype(np.float32)
