"""AWQ: input channels that carry much are scaled up before quantization, and down where they come from.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv 2306.00978. Scales are powers of the mean absolute input (optionally over the weights' own
size), the exponent chosen by the output error on a grid; each block's range is then clipped by its
own output error. The inverse goes into what produces the inputs: a norm's weight, or rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.families.base import DecoderSpec
from exporter.quantizers.grid import Blocks, best_grid
from exporter.quantizers.hessian import mean_square
from exporter.quantizers.packing import pack
from exporter.quantizers.rtn import quantize_matrix

Array = NDArray[np.float32]

EXPONENTS = tuple(i / 20 for i in range(20))
# Rows of each matrix that the search of one exponent looks at: more do not change its choice.
SEARCH_ROWS = 512
SMALLEST_INPUT = 1e-4
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class FoldPair:
    """Matrices that read the same values, and what these come from.

    The columns of `readers` (tensor names) are multiplied by s and `source` is divided by it: a norm
    weight ``[K]``, or the rows of a matrix and its `bias` ("" for none). `shared`: consecutive heads of
    `width` columns that are copies of one head of the source (grouped queries); 1 for none.
    """

    source: str
    readers: tuple[str, ...]
    shared: int = 1
    width: int = 0
    bias: str = ""


@dataclass(frozen=True)
class AwqScales:
    """scales ``[K]`` with the exponents of input and weight size that gave them; `error` relative to
    the output's mean square, `plain` the same without scales.
    """

    scales: Array
    exponent: float
    weight_exponent: float
    error: float
    plain: float


def fold_pairs(spec: DecoderSpec, layer: int) -> tuple[FoldPair, ...]:
    """The pairs of a Llama block, by tensor name. A scale may pass through all of them: RMS norm
    weights and value rows multiply what they give, ``silu(gate) * up`` is linear in up.
    """
    at = f"{spec.prefix}layers.{layer}."
    attention, mlp = at + "self_attn.", at + "mlp."
    return (
        FoldPair(
            at + "input_layernorm.weight", tuple(f"{attention}{n}_proj.weight" for n in "qkv")
        ),
        FoldPair(
            attention + "v_proj.weight",
            (attention + "o_proj.weight",),
            spec.heads // spec.kv_heads,
            spec.head_dim,
            attention + "v_proj.bias" if spec.qkv_bias else "",
        ),
        FoldPair(
            at + "post_attention_layernorm.weight",
            (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
        ),
        FoldPair(mlp + "up_proj.weight", (mlp + "down_proj.weight",)),
    )


def awq_scales(
    weights: Sequence[Array],
    fmt: BlockFormat,
    stats: InputStatistics,
    *,
    shared: int = 1,
    width: int = 0,
) -> AwqScales:
    """The scales for matrices ``[N, K]`` that read the same inputs.

    Their output errors are added, each relative to its output's mean square. Never worse, by that
    measure, than no scales.
    """
    sampled = [w[:: max(1, -(-w.shape[0] // SEARCH_ROWS))] for w in weights]
    sizes = [mean_square(w, stats) for w in sampled]
    inputs = _per_source(np.maximum(stats.mean_abs, SMALLEST_INPUT), shared, width)
    own = _per_source(_weight_size(weights, fmt.block), shared, width)

    def lost(scales: Array) -> float:
        total = 0.0
        for w, size in zip(sampled, sizes, strict=True):
            if size:
                back = dequantize(quantize_matrix(w * scales, fmt, search=False)) / scales
                total += mean_square(back - w, stats) / size
        return total / len(sampled)

    ones = np.ones_like(inputs)
    plain = lost(ones)
    best = AwqScales(ones, 0.0, 0.0, plain, plain)
    for exponent in EXPONENTS:
        for weight_exponent in (0.0, 1.0 - exponent):
            if exponent == weight_exponent == 0.0:
                continue
            scales = _scales(inputs, own, exponent, weight_exponent)
            error = lost(scales)
            if error < best.error:
                best = AwqScales(scales, exponent, weight_exponent, error, plain)
    return best


def clip_matrix(
    weight: Array, fmt: BlockFormat, stats: InputStatistics, *, name: str = "matrix"
) -> PackedMatrix:
    """Round ``[N, K]`` to nearest, each block clipped by its own output error ``e^T H e``.

    Raises `InputRefused` as plain rounding does.
    """
    rows, columns = weight.shape
    blocks = -(-columns // fmt.block)
    codes = np.zeros((rows, blocks, fmt.block), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    zeros = np.empty((rows, blocks), np.uint8)
    for b in range(blocks):
        part = slice(b * fmt.block, min((b + 1) * fmt.block, columns))
        metric = np.ascontiguousarray(stats.second_moment[part, part])
        # A little of the plain squared error, for directions that calibration never showed.
        metric.flat[:: metric.shape[0] + 1] += np.float32(0.01 * metric.diagonal().mean() + 1e-12)
        data = Blocks(np.ascontiguousarray(weight[:, part].T), metric)
        grid, _ = best_grid(data, fmt, search=True, name=name)
        codes[:, b] = (-grid.low).astype(np.uint8)[:, None]  # padding stands for 0
        codes[:, b, : part.stop - part.start] = (data.codes(grid) - grid.low).T
        scales[:, b] = grid.scale
        zeros[:, b] = -grid.low
    return pack(codes, scales, None if fmt.symmetric else zeros, fmt, columns)


def scaled_statistics(stats: InputStatistics, scales: Array) -> InputStatistics:
    """Statistics of the inputs divided by `scales` ``[K]`` (one more copy of the second moment)."""
    inverse = (1 / scales).astype(np.float32)
    moment = stats.second_moment * inverse
    moment *= inverse[:, None]
    return replace(
        stats,
        second_moment=moment,
        mean_abs=stats.mean_abs * inverse,
        rows=stats.rows * inverse,
    )


def fold_into(source: Array, scales: Array, pair: FoldPair) -> tuple[Array, Array]:
    """`source` divided by `scales` ``[K]`` as it will be stored, and the scales that undo exactly that.

    A norm weight is rounded to float16 here, so that the readers' columns make up for the rounding.
    """
    if source.ndim == 1:
        with np.errstate(over="ignore"):
            folded = (source / scales).astype(np.float16).astype(np.float32)
        usable = (folded != 0) & np.isfinite(folded)
        folded = np.where(usable, folded, source)
        return folded, np.divide(source, folded, out=np.ones_like(source), where=folded != 0)
    return source / _row_scales(scales, pair)[:, None], scales


def fold_bias(bias: Array, scales: Array, pair: FoldPair) -> Array:
    """The bias ``[N]`` of a matrix that `fold_into` divided by `scales` ``[K]``, divided likewise."""
    return np.asarray(bias / _row_scales(scales, pair), np.float32)


def _row_scales(scales: Array, pair: FoldPair) -> Array:
    """The scale of each row of the source: consecutive heads that are copies have the same."""
    if pair.shared == 1:
        return scales
    return scales.reshape(-1, pair.shared, pair.width)[:, 0].ravel()


def _per_source(values: Array, shared: int, width: int) -> Array:
    """`values` ``[K]`` averaged over the heads that come from one head of the source."""
    if shared == 1:
        return values
    heads = values.reshape(-1, shared, width)
    mean = heads.mean(axis=1, keepdims=True)
    return np.asarray(np.broadcast_to(mean, heads.shape).reshape(-1), np.float32)


def _weight_size(weights: Sequence[Array], block: int) -> Array:
    """Mean over all rows of each column's magnitude relative to the largest in its block."""
    total, rows = np.zeros(weights[0].shape[1], np.float32), 0
    for w in weights:
        for start in range(0, w.shape[1], block):
            part = np.abs(w[:, start : start + block])
            largest = np.maximum(part.max(axis=1, keepdims=True), np.float32(1e-12))
            total[start : start + block] += (part / largest).sum(axis=0)
        rows += w.shape[0]
    sizes: Array = np.maximum(total / np.float32(rows), np.float32(1e-4))
    return sizes


def _scales(inputs: Array, own: Array, exponent: float, weight_exponent: float) -> Array:
    scales = inputs ** np.float32(exponent) / own ** np.float32(weight_exponent)
    scales = np.maximum(scales, SMALLEST_SCALE)
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()), np.float32)
