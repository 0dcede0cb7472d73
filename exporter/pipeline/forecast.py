"""What a mixed scheme will measure, and whether its size budget can be met, from the headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.adapters.base import open_newest
from exporter.families.base import DecoderSpec
from exporter.families.checkpoints import published_config
from exporter.families.specs.walked import require_folding
from exporter.families.table import family_of, task_family_of
from exporter.pipeline.budget import Budget
from exporter.pipeline.mixed import HELD_OUT_SAMPLES, SENSITIVITY_SAMPLES
from exporter.pipeline.tradeoff import POINTS, Chooser
from exporter.quantizers.plan import refuse_calibrated, refuse_decoder
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.units import FLOAT16, Unit, plan_units


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes of weights. `limit` is the size budget, None when only the KL is bounded.

    For each of `prompts` the sensitivities take `block_passes` runs of one decoder block and
    `vision_passes` of the vision part; then about `choices` whole models are measured on `held_out`
    prompts.
    """

    units: int
    measured: int
    least_bytes: int
    uniform_bytes: int
    float16_bytes: int
    limit: int | None
    max_kl: float | None
    prompts: int
    block_passes: int
    vision_passes: int
    held_out: int
    choices: int

    def to_json(self) -> dict[str, Any]:
        """For `medexport plan --json`."""
        return asdict(self)

    def to_text(self) -> str:
        """Sizes, feasibility and cost, a line each."""
        whole = self.float16_bytes
        sizes = (
            f"sizes    {self.least_bytes / 1e6:.2f} MB with fewest bits "
            f"({self.least_bytes / whole:.3f} of float16), {self.uniform_bytes / 1e6:.2f} MB as "
            f"uniform int4 ({self.uniform_bytes / whole:.3f}), {whole / 1e6:.2f} MB in float16"
        )
        if self.limit is not None:
            allowed = f"budget   {self.limit / 1e6:.2f} MB of weights: can be met"
        else:
            allowed = "budget   no size: as small as the KL allows"
        if self.max_kl is not None:
            allowed += f"; KL at most {self.max_kl} nats, known once it is measured"
        cost = (
            f"measures {self.measured} forms of {self.units} units on {self.prompts} prompts "
            f"({self.block_passes} passes of a decoder block and {self.vision_passes} of the vision "
            f"part each), then about {self.choices} whole models on {self.held_out} other prompts; "
            "the number of prompts bounds the cost, no unit is left out"
        )
        return "\n".join((sizes, allowed, cost))


def check_scheme(folder: Path, scheme: Scheme, budget: Budget) -> None:
    """Raise `InputRefused` when the model of `folder` is of a kind that the scheme's calibration does
    not know, or when the size cannot be met.
    """
    if scheme.calibrated:
        config = published_config(folder)
        task = task_family_of(config)
        if task is not None:
            refuse_calibrated(task, scheme)
        refuse_decoder(family_of(config).decoder_spec(config), scheme)
    if scheme.choices:
        forecast(folder, scheme, budget)


def forecast(folder: Path, scheme: Scheme, budget: Budget) -> Forecast:
    """The forecast for a float model folder. Raises `InputRefused` when the size cannot be met."""
    config = published_config(folder)
    family = family_of(config)
    decoder = require_folding(family.decoder_spec(config), f"scheme {scheme.name}")
    tower = family.tower_spec(config)
    plans = plan_units(open_newest(folder), decoder, tower, scheme)
    chooser = Chooser(plans, budget)
    forms = sum(bits != FLOAT16 for bits in plans.choices)
    return Forecast(
        units=len(plans.units),
        measured=forms * len(plans.units),
        least_bytes=chooser.least_bytes,
        uniform_bytes=chooser.uniform_bytes,
        float16_bytes=chooser.float16_bytes,
        limit=chooser.limit,
        max_kl=budget.kl,
        prompts=SENSITIVITY_SAMPLES,
        block_passes=forms * sum(_passes(unit, decoder) for unit in plans.units),
        vision_passes=forms * sum(unit.vision for unit in plans.units),
        held_out=HELD_OUT_SAMPLES,
        choices=POINTS + forms + 3,
    )


def _passes(unit: Unit, decoder: DecoderSpec) -> int:
    """Decoder blocks that run to measure a unit: from its own on; none for the head."""
    name = unit.tensors[0]
    if name == decoder.head:
        return 0
    prefix = f"{decoder.prefix}layers."
    if name.startswith(prefix):
        return decoder.layers - int(name.removeprefix(prefix).split(".")[0])
    return decoder.layers
