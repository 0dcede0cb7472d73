"""Roofline: how fast a machine can be at best, and how fast it is likely to be."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.catalog.schema import Precision, Quantity, TargetProfile
from exporter.families.shapes.parts import ModelShape
from exporter.pipeline.fit_sizes import (
    part_bytes,
    prefill_operations,
    text_operations,
    token_bytes,
    token_operations,
    tower_operations,
)
from exporter.quantizers.schemes import Scheme

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Efficiency:
    """Share of a data sheet's bandwidth and arithmetic rate that code reaches."""

    bandwidth: float
    arithmetic: float


LIMIT = Efficiency(1.0, 1.0)
# GPUs. Assumed: attention, norms and launches keep matrix units below half.
LIKELY = Efficiency(0.7, 0.4)
# Processors, of a class profile's figures, which are no machine's own: four whole bundles on two cores
# with AVX2 reached 0.17 to 0.25 of the bandwidth and 0.60 to 0.78 of the rate (docs/fit.md).
CPU_LIKELY = Efficiency(0.22, 0.66)


@dataclass(frozen=True)
class Load:
    """One image, a prompt of `prompt` positions, `context` positions at the end, `batch` texts."""

    prompt: int
    context: int
    batch: int


@dataclass(frozen=True)
class Speed:
    """Seconds of the vision part and the prefill, and tokens a second of all `batch` texts together.

    `bound_by` says what limits writing tokens: "memory" or "arithmetic". Zero tokens a second:
    the model writes none.
    """

    vision_s: float
    prefill_s: float
    tokens_per_s: float
    bound_by: str
    batch: int = 1

    @property
    def first_token_s(self) -> float:
        """Time to the first token: vision part and prefill."""
        return self.vision_s + self.prefill_s

    def seconds_for(self, tokens: int) -> float:
        """Until a caption of `tokens` tokens is there: the texts of a batch end together."""
        written = self.batch * tokens / self.tokens_per_s if self.tokens_per_s else 0.0
        return self.first_token_s + written


def likely_on(target: TargetProfile) -> Efficiency:
    """What code is likely to reach of the figures of `target`."""
    return CPU_LIKELY if target.provider == CPU else LIKELY


def predict_speed(
    shape: ModelShape,
    scheme: Scheme,
    target: TargetProfile,
    load: Load,
    efficiency: Efficiency = LIMIT,
) -> Speed | None:
    """Speed of `shape` on `target`; None when its bandwidth or rates are not known."""
    if target.bandwidth_gbs is None:
        return None
    rates = [
        target.rates.get(p) for p in (_decoder_precision(target, scheme), _vision_precision(target))
    ]
    if None in rates:
        return None
    decoder_rate, vision_rate = (_reached(r, efficiency.arithmetic) * 1e12 for r in rates if r)
    bandwidth = _reached(target.bandwidth_gbs, efficiency.bandwidth) * 1e9
    parts = part_bytes(shape, scheme)
    encoders = tower_operations(shape) + text_operations(shape)
    tiles = shape.tower.tiles if shape.tower else 1
    seen = (parts.get("vision", 0) + parts.get("text", 0)) * tiles
    vision = max(encoders / vision_rate, seen / bandwidth)
    if shape.decoder is None:
        return Speed(vision, 0.0, 0.0, "")
    prefill = max(
        load.batch * prefill_operations(shape, load.prompt) / decoder_rate,
        parts.get("decoder", 0) / bandwidth,
    )
    cache = shape.decoder.read_values(load.context) * cache_item(target) * load.batch
    reading = (token_bytes(shape, scheme) + cache) / bandwidth
    counting = load.batch * token_operations(shape, load.context) / decoder_rate
    step, why = max((reading, "memory"), (counting, "arithmetic"))
    return Speed(vision, prefill, load.batch / step, why, load.batch)


def cache_item(target: TargetProfile) -> int:
    """Bytes of a key or value: float32 on a CPU, float16 elsewhere."""
    return 4 if target.provider == CPU else 2


def _decoder_precision(target: TargetProfile, scheme: Scheme) -> Precision:
    """What the decoder multiplies in: a CPU rounds activations to int8 where weights are packed."""
    if target.provider != CPU:
        return "fp16"
    return "int8" if scheme.decoder and target.accuracy_level == 4 else "fp32"


def _vision_precision(target: TargetProfile) -> Precision:
    return "fp32" if target.provider == CPU else "fp16"


def _reached(quantity: Quantity, efficiency: float) -> float:
    """What was measured was reached; of a data sheet's figure `efficiency` is."""
    return quantity.value * (1.0 if quantity.confidence == "measured" else efficiency)
