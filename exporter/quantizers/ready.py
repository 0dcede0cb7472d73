"""Tensors that are quantized before the folder is written, and how packed ones are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from exporter.core.blocks import QDATA, SCALES, ZEROS, PackedMatrix
from exporter.quantizers.plan import LayerPlan


@dataclass(frozen=True)
class ReadyTensor:
    """A tensor of the checkpoint that was quantized (or changed) before: what stores it, by name.

    `notes`: further keys of its row in quantization.json.
    """

    stored: Mapping[str, NDArray[Any]]
    relative_error: float
    notes: Mapping[str, Any]


class ReadyTensors(Protocol):
    """Gives those of the plan's tensors that need no more work."""

    def take(self, plan: LayerPlan) -> ReadyTensor | None:
        """The finished tensor, or None when it is quantized here."""
        ...


def packed_tensors(name: str, packed: PackedMatrix) -> dict[str, NDArray[Any]]:
    """The tensors that store a matrix, by name, in the order of `LayerPlan.entries`."""
    stored: dict[str, NDArray[Any]] = {name + QDATA: packed.qdata, name + SCALES: packed.scales}
    if packed.zero_points is not None:
        stored[name + ZEROS] = packed.zero_points
    return stored
