"""SmoothQuant: products in 8-bit integers with input ranges fixed by calibration.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438: where a norm precedes, input channel j is divided by
``s_j = max|x_j|**alpha / max|w_j|**(1 - alpha)`` and the weights' column multiplied by it. `alpha`
and the share of the input range that the codes cover are chosen per group of matrices on a small
grid, by the error of the outputs for sampled inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.static8 import MIDDLE, StaticMatrix
from exporter.quantizers.products import product

Array = NDArray[np.float32]
STEPS, TOP = 127, 255
SMALLEST = np.float32(1e-5)


@dataclass(frozen=True)
class SmoothSettings:
    """`alphas` (0: no smoothing) and `clips` (share of the range) are tried; a layer whose product in
    8 bits alone moves the vision part's features by more than `layer_limit` of their norm stays in
    float16, and so do the worst until all together move them by at most `total_limit`.
    """

    alphas: tuple[float, ...] = (0.5, 0.0, 0.25, 0.4, 0.6, 0.75, 0.9)
    clips: tuple[float, ...] = (1.0, 0.9, 0.75, 0.6)
    layer_limit: float = 0.02
    total_limit: float = 0.05


@dataclass(frozen=True)
class Observed:
    """What the matrices of one group were multiplied with: `low` and `high` ``[K]`` over all inputs,
    and some of the inputs ``[R, K]``.
    """

    low: Array
    high: Array
    rows: Array


@dataclass(frozen=True)
class Smoothed:
    """The choice for matrices that read the same inputs: divide these by `scales` ``[K]``, then code
    them by `input_scale` and `input_zero`; `error` is that of the sampled outputs, relative.
    """

    alpha: float
    clip: float
    scales: Array
    input_scale: float
    input_zero: int
    error: float


def smooth(
    weights: Sequence[Array],
    seen: Observed,
    settings: SmoothSettings,
    *,
    norm: Array | None,
    name: str,
) -> Smoothed:
    """Choose for matrices ``[N, K]``; `norm` is the weight ``[K]`` of the norm before them, or None.

    Scales are such that ``norm / scales`` is exactly a float16. Raises `InputRefused` naming `name`
    when weights or inputs are not finite.
    """
    finite = all(np.isfinite(w).all() for w in (*weights, seen.low, seen.high))
    if not finite:
        raise InputRefused(
            f"'{name}' or its inputs hold NaN or infinity; look for an overflow in training"
        )
    outputs = [product(seen.rows, w.T) for w in weights]
    sizes = [max(float(np.linalg.norm(y)), 1e-30) for y in outputs]
    best: Smoothed | None = None
    for alpha in settings.alphas if norm is not None else (0.0,):
        scales = _scales(weights, seen, alpha, norm)
        changed = [_rounded(w * scales) for w in weights]
        rows = seen.rows / scales
        low, high = (seen.low / scales).min(), (seen.high / scales).max()
        for clip in settings.clips:
            step, zero = _input_grid(float(low) * clip, float(high) * clip)
            coded = code_inputs(rows, step, zero)
            error = sum(
                float(np.linalg.norm(product(coded, w.T) - y)) / size
                for w, y, size in zip(changed, outputs, sizes, strict=True)
            ) / len(weights)
            if best is None or error < best.error:
                best = Smoothed(alpha, clip, scales, step, zero, error)
    if best is None:
        raise ValueError("no alpha or no clip to try")
    return best


def static_matrix(weight: Array, chosen: Smoothed) -> StaticMatrix:
    """The matrix ``[N, K]`` with its columns multiplied by the chosen scales, in 8 bits by row."""
    codes, scales = _codes(weight * chosen.scales)
    unsigned = (codes + np.float32(MIDDLE)).astype(np.uint8)
    return StaticMatrix(unsigned, scales, chosen.input_scale, chosen.input_zero)


def code_inputs(x: Array, scale: float, zero: int) -> Array:
    """What 8-bit inputs stand for."""
    codes = np.clip(np.rint(x / np.float32(scale)) + zero, 0, TOP) - zero
    return np.asarray(codes * np.float32(scale), np.float32)


def _scales(weights: Sequence[Array], seen: Observed, alpha: float, norm: Array | None) -> Array:
    """Scales ``[K]`` of one alpha, centred around 1, as the stored norm will have them."""
    ones = np.ones_like(seen.low)
    if norm is None or not alpha:
        return ones
    inputs = np.maximum(np.maximum(-seen.low, seen.high), SMALLEST)
    columns = np.maximum(np.max([np.abs(w).max(axis=0) for w in weights], axis=0), SMALLEST)
    wanted = inputs ** np.float32(alpha) / columns ** np.float32(1 - alpha)
    wanted /= np.exp(np.log(wanted).mean())
    with np.errstate(over="ignore"):
        folded = (norm / wanted).astype(np.float16).astype(np.float32)
    usable = np.isfinite(folded) & (folded != 0) & (norm != 0)
    return np.asarray(np.divide(norm, folded, out=ones, where=usable), np.float32)


def _input_grid(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of uint8 codes from `low` to `high`, zero among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max((high - low) / TOP, 1e-9)))
    return scale, int(np.clip(np.rint(-low / scale), 0, TOP))


def _codes(weight: Array) -> tuple[Array, Array]:
    """Codes from -127 to 127 and the scale of each row."""
    scales = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-12)) / np.float32(STEPS)
    return np.asarray(np.rint(weight / scales[:, None]), np.float32), scales.astype(np.float32)


def _rounded(weight: Array) -> Array:
    codes, scales = _codes(weight)
    return codes * scales[:, None]
