"""The units of a mixed scheme: matrices that share an input and get one format, and their plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec, VisionSpec
from exporter.quantizers.plan import LayerPlan, plan_layers
from exporter.quantizers.schemes import Scheme

FLOAT16 = 16
# Matrices of a block that multiply the same values, and that a graph stacks where formats agree.
SHARED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
NUMBERED = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Unit:
    """Matrices that get one format; `vision` when they belong to the vision part."""

    name: str
    tensors: tuple[str, ...]
    vision: bool


@dataclass(frozen=True)
class UnitPlans:
    """The plan of every tensor under each choice of bits (16: float16), and what may be chosen for.

    `uniform` is the plan of the scheme's own formats: what a budget is compared with.
    """

    units: tuple[Unit, ...]
    by_bits: Mapping[int, tuple[LayerPlan, ...]]
    uniform: tuple[LayerPlan, ...]

    def unit_bytes(self, unit: Unit, bits: int) -> int:
        """Bytes of a unit's matrices as they will be stored."""
        return sum(p.bytes for p in self.by_bits[bits] if p.name in unit.tensors)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of what is float16 whatever is chosen: norms, biases and the like."""
        free = {name for unit in self.units for name in unit.tensors}
        return sum(p.bytes for p in self.by_bits[FLOAT16] if p.name not in free)

    @property
    def choices(self) -> tuple[int, ...]:
        """The bits that a unit may have, fewest first."""
        return tuple(sorted(self.by_bits))

    def chosen(self, bits: Mapping[str, int]) -> tuple[LayerPlan, ...]:
        """The plan in which each unit has the bits given by its name."""
        at = {name: bits[unit.name] for unit in self.units for name in unit.tensors}
        rows = [{p.name: p for p in plan} for plan in self.by_bits.values()]
        tables = dict(zip(self.by_bits, rows, strict=True))
        return tuple(tables[at.get(p.name, FLOAT16)][p.name] for p in self.by_bits[FLOAT16])

    def bits_of(self, plan: Sequence[LayerPlan]) -> dict[str, int]:
        """The bits that each unit has in a plan that treats the matrices of a unit alike."""
        rows = {p.name: p.format.bits if p.format else FLOAT16 for p in plan}
        return {unit.name: rows[unit.tensors[0]] for unit in self.units}


def plan_units(
    checkpoint: Checkpoint, decoder: DecoderSpec, tower: VisionSpec, scheme: Scheme
) -> UnitPlans:
    """Units and plans of a scheme with `choices`. Raises what `plan_layers` raises, ValueError for
    another scheme.
    """
    if not scheme.choices:
        raise ValueError(f"scheme {scheme.name} has no formats to choose among")
    by_bits = {
        (fmt.bits if fmt else FLOAT16): plan_layers(
            checkpoint,
            decoder,
            tower,
            replace(scheme, decoder=fmt, head=fmt, embedding=fmt, vision=fmt),
        )
        for fmt in (*scheme.choices, None)
    }
    vision = {tensor.name for tensor in tower.tensors()}
    found: dict[str, list[str]] = {}
    quantized = {p.name for plan in by_bits.values() for p in plan if p.format}
    for plan in by_bits[FLOAT16]:
        if plan.name in quantized:
            found.setdefault(unit_name(plan.name, in_vision=plan.name in vision), []).append(
                plan.name
            )
    units = tuple(Unit(n, tuple(names), names[0] in vision) for n, names in found.items())
    return UnitPlans(units, by_bits, plan_layers(checkpoint, decoder, tower, scheme))


def unit_name(tensor: str, *, in_vision: bool) -> str:
    """The unit of a matrix: one block of the vision part, or what shares an input in the decoder."""
    module = tensor.removesuffix(".weight")
    if in_vision:
        block = NUMBERED.match(tensor)
        return block.group(1) if block else module
    parent, _, last = module.rpartition(".")
    return f"{parent}.{SHARED.get(last, last)}" if parent else module
