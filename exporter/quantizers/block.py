"""One decoder block with the statistics of its inputs: fold scales, then quantize each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.families.specs.decoder import TextDecoder
from exporter.quantizers.awq import (
    FoldPair,
    awq_scales,
    clip_matrix,
    fold_bias,
    fold_into,
    fold_pairs,
    scaled_statistics,
)
from exporter.quantizers.gptq import GptqSettings, gptq_matrix
from exporter.quantizers.guards import guard
from exporter.quantizers.hessian import mean_square
from exporter.quantizers.hqq import hqq_matrix
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.schemes import CALIBRATED

Array = NDArray[np.float32]
FOLDING = frozenset({"awq", "awq+gptq"})


@dataclass
class BlockResult:
    """A quantized block by tensor name: packed matrices, float tensors that changed, the relative
    error of each packed matrix, and what its row in quantization.json says beyond that.
    """

    packed: dict[str, PackedMatrix] = field(default_factory=dict)
    floats: dict[str, Array] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Folded:
    """A block's tensors with scales folded in, the scales ``[K]`` of each matrix that has some, and
    how they were chosen.
    """

    weights: dict[str, Array]
    scales: dict[str, Array] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


def quantize_block(
    layer: int,
    spec: TextDecoder,
    plans: Sequence[LayerPlan],
    weights: Mapping[str, Array],
    inputs: Mapping[str, InputStatistics],
    settings: GptqSettings,
) -> BlockResult:
    """Quantize the matrices of a block as their plans say.

    `weights` and `inputs` as a `BlockVisitor` gets them. Scales are folded into Llama blocks alone.
    Errors are relative to the matrix as it is quantized, with scales folded in. Raises `InputRefused`
    when inputs of a matrix are missing that its method needs.
    """
    missing = [p.name for p in plans if p.method in CALIBRATED and p.name not in inputs]
    if missing:
        raise InputRefused(
            f"block {layer}: no inputs were seen for '{missing[0]}'; expected statistics of every "
            "quantized matrix"
        )
    result, folded = BlockResult(), Folded(dict(weights))
    if isinstance(spec, DecoderSpec):
        folded = fold_block(layer, spec, plans, weights, inputs)
    for plan in plans:
        if plan.format:
            _quantize(plan, folded, inputs.get(plan.name), settings, result)
    changed = {n for n, w in folded.weights.items() if w is not weights[n]}
    for name in sorted(changed - result.packed.keys()):
        result.floats[name] = folded.weights[name]
    return result


def fold_block(
    layer: int,
    spec: DecoderSpec,
    plans: Sequence[LayerPlan],
    weights: Mapping[str, Array],
    inputs: Mapping[str, InputStatistics],
) -> Folded:
    """The block with scales folded in where all readers of a pair are planned to have them.

    It computes what it did before, up to float32 rounding.
    """
    folded = Folded(dict(weights))
    by_name = {p.name: p for p in plans}
    for pair in fold_pairs(spec, layer):
        readers = [by_name[n] for n in pair.readers]
        fmt = readers[0].format
        if fmt and all(p.method in FOLDING and p.format == fmt for p in readers):
            _fold(pair, fmt, inputs[pair.readers[0]], folded)
    return folded


def _fold(pair: FoldPair, fmt: BlockFormat, stats: InputStatistics, folded: Folded) -> None:
    """Choose and apply the scales of one pair."""
    weights = folded.weights
    chosen = awq_scales(
        [weights[n] for n in pair.readers], fmt, stats, shared=pair.shared, width=pair.width
    )
    weights[pair.source], exact = fold_into(weights[pair.source], chosen.scales, pair)
    if pair.bias:
        weights[pair.bias] = fold_bias(weights[pair.bias], exact, pair)
    for name in pair.readers:
        weights[name] = np.asarray(weights[name] * exact, np.float32)
        folded.scales[name] = exact
        folded.notes[name] = {
            "exponents": [round(chosen.exponent, 2), round(chosen.weight_exponent, 2)],
            "search_gain": _ratio(chosen.error, chosen.plain),
        }


def _quantize(
    plan: LayerPlan,
    folded: Folded,
    stats: InputStatistics | None,
    settings: GptqSettings,
    result: BlockResult,
) -> None:
    name, weight = plan.name, folded.weights[plan.name]
    if stats is not None and name in folded.scales:
        stats = scaled_statistics(stats, folded.scales[name])
    packed, notes = _packed(plan, weight, stats, settings)
    values = dequantize(packed)
    values -= weight
    result.packed[name] = packed
    result.errors[name] = _ratio(float(np.linalg.norm(values)), float(np.linalg.norm(weight)))
    if stats is None:
        squares = np.einsum("nk,nk->k", weight, weight)
        guards = guard(packed, squares.astype("f8"), of="weights", name=name)
        result.notes[name] = {**notes, **guards.document()}
        return
    guards = guard(packed, stats.second_moment.diagonal(), of="inputs", name=name)
    lost, whole = mean_square(values, stats), mean_square(weight, stats)
    measured = {"output_error": float(np.sqrt(_ratio(max(lost, 0.0), whole)))}
    result.notes[name] = {**folded.notes.get(name, {}), **notes, **measured, **guards.document()}


def _packed(
    plan: LayerPlan, weight: Array, stats: InputStatistics | None, settings: GptqSettings
) -> tuple[PackedMatrix, dict[str, Any]]:
    fmt, name = plan.format, plan.name
    if fmt is None:
        raise ValueError(f"{name} is not quantized")
    if stats is None:
        return _rounded(plan, fmt, weight), {}
    match plan.method:
        case "gptq" | "awq+gptq":
            done = gptq_matrix(weight, fmt, stats, settings, name=name)
            notes = {
                "damping": done.damping,
                "damping_raised": done.raised,
                "dead_inputs": done.dead,
            }
            return done.packed, notes
        case "awq":
            return clip_matrix(weight, fmt, stats, name=name), {}
        case _:
            return _rounded(plan, fmt, weight), {}


def _rounded(plan: LayerPlan, fmt: BlockFormat, weight: Array) -> PackedMatrix:
    """A matrix by a method that looks at its weights alone."""
    match plan.method:
        case "hqq":
            return hqq_matrix(weight, fmt, name=plan.name)
        case "rtn" | "rtn-mse":
            search = plan.method == "rtn-mse"
            return quantize_matrix(weight, fmt, search=search, name=plan.name)
        case _:
            raise ValueError(
                f"{plan.name} is planned as {plan.method}, which no block is quantized by"
            )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
