"""What a choice of bits per unit costs: the weights that it stands for, measured and kept in a journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.artifact import write_atomic
from exporter.core.blocks import QDATA, dequantize
from exporter.core.digest import canonical_json
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.quantizers.allocate import Option
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, stored_matrix
from exporter.quantizers.units import FLOAT16, UnitPlans

Array = NDArray[np.float32]
Bits = Mapping[str, int]
# Nats below which the KL of float32 logits is rounding: a quantized unit never counts as free.
LEAST = 1e-9


class Replaced(Mapping[str, Array]):
    """Weights by name, each made when it is asked for and not kept: one matrix is in memory."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Array]) -> None:
        self._names, self._load = dict.fromkeys(names), load

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class OnFloatInputs:
    """A `BlockVisitor` that quantizes each block on the float model's inputs and leaves it as it was.

    What a unit costs alone is measured with the matrices that it keeps in its store.
    """

    def __init__(self, inner: BlockQuantizer) -> None:
        self._inner = inner

    def __call__(
        self,
        layer: int,
        weights: Mapping[str, Array],
        inputs: Mapping[str, InputStatistics],
    ) -> Mapping[str, Array]:
        """See `BlockVisitor`; nothing changes."""
        self._inner(layer, weights, inputs)
        return {}


def open_blocks(store: BlockStore, spec: DecoderSpec) -> list[Checkpoint]:
    """The blocks that `store` holds, checked once."""
    return [store.open(layer) for layer in range(spec.layers) if store.rows(layer) is not None]


def planned_weights(
    checkpoint: Checkpoint, plan: Sequence[LayerPlan], blocks: Sequence[Checkpoint]
) -> Replaced:
    """What the quantized matrices of `plan` stand for: from `blocks` where one holds them in that
    format, else rounded now as the plan says.
    """
    rows = {p.name: p for p in plan if p.format}

    def load(name: str) -> Array:
        row = rows[name]
        for block in blocks:
            if _holds(block, row):
                return dequantize(stored_matrix(block, row))
        if row.format is None or row.method not in ("rtn", "rtn-mse"):
            raise ValueError(f"'{name}' is planned as {row.method} and in no stored block")
        search = row.method == "rtn-mse"
        values = checkpoint.float32(name)
        return dequantize(quantize_matrix(values, row.format, search=search, name=name))

    return Replaced(list(rows), load)


def _holds(block: Checkpoint, row: LayerPlan) -> bool:
    wanted = row.entries()
    return row.name + QDATA in block and all(
        name in block and (block.info(name).dtype, block.info(name).shape) == entry
        for name, entry in wanted.items()
    )


@dataclass
class Journal:
    """Measured KL by choice of bits, in a file that a run which was killed goes on from.

    `key` says what they were measured on; a file with another key is ignored.
    """

    path: Path
    key: str
    found: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            known = json.loads(self.path.read_bytes())
            if known["key"] == self.key:
                self.found = known["kl"]

    def kl(self, bits: Bits, measure: Callable[[Bits], float]) -> float:
        """The KL of units stored as `bits` (those left out: float16), measured once."""
        low = {name: b for name, b in sorted(bits.items()) if b != FLOAT16}
        if not low:
            return 0.0
        at = canonical_json(low).decode()
        if at not in self.found:
            self.found[at] = max(measure(low), LEAST)
            write_atomic(self.path, canonical_json({"key": self.key, "kl": self.found}))
        return self.found[at]


def measure_units(
    plans: UnitPlans, kl: Callable[[Bits], float], progress: Progress = silent
) -> list[list[Option]]:
    """By unit, in the order of `plans`, its options with the KL when only this unit is quantized."""
    total, done, found = len(plans.units) * len(plans.choices), 0, []
    for unit in plans.units:
        options = []
        for bits in plans.choices:
            progress(done, total, f"sensitivity of {unit.name}, {bits} bits")
            options.append(Option(bits, plans.unit_bytes(unit, bits), kl({unit.name: bits})))
            done += 1
        found.append(options)
    return found
