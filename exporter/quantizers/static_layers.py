"""Which vision matrices are multiplied in 8 bits, and what the folder then holds of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.static8 import STATIC_CODE, dequantize_static
from exporter.core.tensors import Checkpoint
from exporter.families.base import VisionSpec
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.ready import ReadyTensor
from exporter.quantizers.run import as_float16
from exporter.quantizers.smooth import Observed, Smoothed, SmoothSettings, static_matrix

Array = NDArray[np.float32]
# The matrices that read what a norm of a transformer block gives, by their names in the block.
NORMED = {
    "layer_norm1": tuple(f"self_attn.{n}_proj.weight" for n in "qkv"),
    "layer_norm2": ("mlp.fc1.weight",),
}


@dataclass(frozen=True)
class Group:
    """Matrices that read the same values: choices are made for all of them together.

    `norm`: the norm before them ("" for none), into which scales are folded.
    """

    names: tuple[str, ...]
    norm: str = ""


@dataclass
class Verdict:
    """Which matrices are multiplied in 8 bits: relative error of the features by matrix, each alone;
    those that stay in float16 with the reason; and the error of all others together.
    """

    errors: dict[str, float]
    left: dict[str, str] = field(default_factory=dict)
    total: float = 0.0

    def document(self) -> dict[str, Any]:
        """For the record of a calibration."""
        return {"features": self.total, "alone": self.errors, "float16": self.left}


def input_groups(seen: Mapping[str, Observed], tower: VisionSpec) -> tuple[Group, ...]:
    """The matrices in groups that read the same values, as their inputs show.

    A norm is known where a group is just what reads it in a transformer block.
    """
    found: dict[bytes, list[str]] = {}
    for name, inputs in seen.items():
        found.setdefault(inputs.low.tobytes() + inputs.high.tobytes(), []).append(name)
    tensors = {t.name for t in tower.tensors()}
    return tuple(Group(tuple(names), _norm_of(names, tensors)) for names in found.values())


def _norm_of(names: Sequence[str], tensors: set[str]) -> str:
    for norm, readers in NORMED.items():
        block = names[0].removesuffix(readers[0])
        if set(names) == {block + r for r in readers} and f"{block}{norm}.weight" in tensors:
            return block + norm
    return ""


def keep_within(
    alone: Mapping[str, float], total: Callable[[Sequence[str]], float], settings: SmoothSettings
) -> Verdict:
    """Leave out matrices until each and all together move the features little enough.

    `alone`: relative error of the features with one matrix in 8 bits; `total` measures it with
    several. The worst goes first.
    """
    verdict = Verdict(dict(alone))
    for name, error in alone.items():
        if error > settings.layer_limit:
            verdict.left[name] = (
                f"in static 8 bits it alone moves the features by {error:.4f} of their norm, more "
                f"than {settings.layer_limit:g}"
            )
    kept = sorted(alone.keys() - verdict.left.keys(), key=lambda n: alone[n])
    verdict.total = total(kept) if kept else 0.0
    while kept and verdict.total > settings.total_limit:
        name, before = kept.pop(), verdict.total
        verdict.left[name] = (
            f"the worst ({alone[name]:.4f}) of the matrices that together moved the features by "
            f"{before:.4f} of their norm, more than {settings.total_limit:g}"
        )
        verdict.total = total(kept) if kept else 0.0
    return verdict


class StaticTensors:
    """`ReadyTensors`: matrices in static 8 bits, and the norms and float matrices that change with them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[Group],
        chosen: Mapping[Group, Smoothed],
        verdict: Verdict,
    ) -> None:
        self._checkpoint, self._verdict = checkpoint, verdict
        self._choice: dict[str, Smoothed] = {}
        self._turned: set[str] = set()
        for group in groups:
            # A group of which nothing is in 8 bits is left as it was.
            if not all(name in verdict.left for name in group.names):
                norm = [f"{group.norm}.{part}" for part in ("weight", "bias")] if group.norm else []
                self._choice |= dict.fromkeys((*group.names, *norm), chosen[group])

    def planned(self, plan: LayerPlan) -> LayerPlan:
        """`plan` as the verdict wants it."""
        if plan.name not in self._verdict.left:
            return plan
        size = 2 * plan.rows * plan.columns
        reason = self._verdict.left[plan.name]
        left = replace(plan, kind="float", format=None, method="none", reason=reason, bytes=size)
        if not plan.turned:
            return left
        self._turned.add(plan.name)  # a float tensor is stored as the checkpoint has it
        return replace(left, shape=plan.shape[::-1], turned=False)

    def take(self, plan: LayerPlan) -> ReadyTensor | None:
        """See `ReadyTensors`."""
        choice = self._choice.get(plan.name)
        if choice is None or (plan.format and plan.method != "smoothquant"):
            return None
        values = self._checkpoint.float32(plan.name)
        turned = plan.turned or plan.name in self._turned
        values = np.ascontiguousarray(values.T) if turned else values
        if plan.format is None:
            changed = folded(values, choice)
            changed = np.ascontiguousarray(changed.T) if turned else changed
            return ReadyTensor({plan.name: as_float16(plan.name, changed)}, 0.0, {})
        matrix = static_matrix(values, choice)
        smoothed = values * choice.scales
        lost = float(np.linalg.norm(dequantize_static(matrix) - smoothed))
        size = float(np.linalg.norm(smoothed))
        notes = {
            "code": STATIC_CODE,
            "alpha": choice.alpha,
            "clip": choice.clip,
            "input_scale": choice.input_scale,
            "input_zero": choice.input_zero,
            "output_error": choice.error,
            "feature_error": self._verdict.errors[plan.name],
        }
        return ReadyTensor(matrix.stored(plan.name), lost / size if size else 0.0, notes)


def folded(values: Array, choice: Smoothed) -> Array:
    """A norm's weight or bias divided by the scales, a matrix' columns multiplied by them."""
    if values.ndim == 1:
        return np.asarray(values / choice.scales, np.float32)
    return np.asarray(values * choice.scales, np.float32)
