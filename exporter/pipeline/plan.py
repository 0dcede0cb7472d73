"""`medexport plan`: what build would do with every tensor, from the headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.adapters.base import open_newest
from exporter.core.tensors import Checkpoint
from exporter.families.checkpoints import folder_config
from exporter.pipeline.budget import read_budget
from exporter.pipeline.forecast import Forecast, forecast
from exporter.pipeline.resolve import Resolved, resolve
from exporter.pipeline.targets import choose_target
from exporter.quantizers.plan import LayerPlan, plan_model
from exporter.quantizers.schemes import Scheme, find_scheme


@dataclass(frozen=True)
class BuildPlan:
    """The resolved inputs, the scheme and the plan of each tensor.

    `forecast`: of a mixed scheme, whose bits are measured; its layers are then those of the default
    budget's uniform plan.
    """

    found: Resolved
    scheme: Scheme
    target: str
    layers: tuple[LayerPlan, ...]
    forecast: Forecast | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights after quantization, graphs not counted."""
        return sum(layer.bytes for layer in self.layers)

    def rows(self) -> list[tuple[str, int, str]]:
        """Storage, number of tensors and megabytes, for a table."""
        groups: dict[str, list[int]] = {}
        for layer in self.layers:
            groups.setdefault(_storage(layer), []).append(layer.bytes)
        return [(name, len(sizes), f"{sum(sizes) / 1e6:.2f}") for name, sizes in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """For `medexport plan --json`."""
        return {
            "resolved": self.found.summary(),
            "scheme": self.scheme.name,
            "target": self.target,
            "weight_bytes": self.weight_bytes,
            "ratio_to_float16": self.ratio,
            "layers": [asdict(layer) for layer in self.layers],
            "mixed": self.forecast.to_json() if self.forecast else None,
        }

    @property
    def ratio(self) -> float:
        """Weight bytes over those of the same tensors in float16."""
        checkpoint = Checkpoint.open(self.found.base.path)
        count = sum(info.nbytes // _item(info.dtype) for info in checkpoint.tensors.values())
        return self.weight_bytes / (2 * count)

    def to_text(self) -> str:
        """One closing line."""
        if self.forecast:
            return (
                f"{self.found.profile.name} as {self.scheme.name} for {self.target}; the table shows "
                f"uniform int4, the bits of each unit are chosen by measurement\n"
                f"{self.forecast.to_text()}"
            )
        return (
            f"{self.found.profile.name} as {self.scheme.name} for {self.target}: "
            f"{self.weight_bytes / 1e6:.1f} MB of weights, {self.ratio:.3f} of float16; "
            f"{len(self.found.adapters)} adapter(s) merged first"
        )


def make_plan(
    *,
    model: str,
    scheme: str,
    target: str,
    weights: Path | None,
    adapters: Sequence[str],
    offline: bool,
    max_size: str | None = None,
    max_kl: float | None = None,
) -> BuildPlan:
    """Plan a build without converting anything. Raises what `build` would raise before its first stage."""
    machine = choose_target(target)
    found = resolve(model, weights, adapters, offline=offline)
    chosen = find_scheme(found.scheme_name(scheme))
    budget = read_budget(max_size, max_kl, mixed=bool(chosen.choices))
    config = folder_config(found.base.path)
    layers = plan_model(open_newest(found.base.path), config, chosen)
    expected = forecast(found.base.path, chosen, budget) if chosen.choices else None
    return BuildPlan(found, chosen, machine.name, layers, expected)


def _storage(layer: LayerPlan) -> str:
    if layer.format is None:
        return "float16"
    form = layer.format
    if layer.method == "smoothquant":
        return f"{layer.kind}, 8 bits static, float16 where parity fails, {layer.method}"
    kind = "symmetric" if form.symmetric else "asymmetric"
    return f"{layer.kind}, {form.bits} bits, blocks of {form.block}, {kind}, {layer.method}"


def _item(dtype: str) -> int:
    return {"F64": 8, "F32": 4}.get(dtype, 2)
