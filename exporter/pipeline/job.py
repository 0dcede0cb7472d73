"""One build under way: what was asked, what was found, and what both say of lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.bundle.manifest import Lineage, Source
from exporter.catalog.schema import TargetProfile
from exporter.pipeline import stages as do
from exporter.pipeline.budget import Budget
from exporter.pipeline.calibrated import Calibration
from exporter.pipeline.evaluation import Evaluation
from exporter.pipeline.request import BuildRequest
from exporter.pipeline.resolve import Resolved
from exporter.pipeline.stage import Stages
from exporter.pipeline.task_evaluation import TaskEvaluation
from exporter.pipeline.tools import tool_versions
from exporter.quantizers.schemes import Scheme
from exporter.runtimes.threads import usable_cores


@dataclass(frozen=True)
class Build:
    """The request and what was resolved from it.

    `evaluation`: None where nothing is compared; its kind follows from what the model does.
    """

    request: BuildRequest
    found: Resolved
    target: TargetProfile
    schemes: Mapping[str, Scheme]
    stages: Stages
    evaluation: Evaluation | TaskEvaluation | None
    calibration: Calibration | None
    budget: Budget

    @property
    def prompt(self) -> str:
        """The instruction that the bundle gives with each image."""
        return self.request.instruction(self.found.profile)

    @property
    def threads(self) -> int:
        """How many threads stages compute with."""
        return self.request.threads or usable_cores()

    def lineage(self) -> Lineage:
        """Digests of everything that the bundle is made of and was measured on."""
        evaluation = None
        if self.evaluation:
            evaluation = Source(
                name=self.evaluation.set_name,
                sha256=self.evaluation.set_digest,
                details={"cases": len(self.evaluation.cases)},
            )
        calibration = None
        if self.calibration:
            images = self.calibration.images
            details = {"cases": len(self.calibration.cases), **self.calibration.drawing()}
            calibration = Source(name=images.name, sha256=images.digest, details=details)
        return Lineage(
            calibration=calibration,
            base=do.base_source(self.found.profile, self.found.base.digest),
            adapters=tuple(Source(name=a.name, sha256=a.digest) for a in self.found.adapters),
            evaluation=evaluation,
        )

    def lineage_lines(self) -> dict[str, str]:
        """The lineage for the report: names and digests, no paths of this machine."""
        lineage = self.lineage()
        named = [
            ("base", lineage.base),
            ("evaluation set", lineage.evaluation),
            ("calibration set", lineage.calibration),
        ]
        named += [(f"adapter {i}", a) for i, a in enumerate(lineage.adapters, 1)]
        lines = {what: f"{s.name}, sha256 {s.sha256}" for what, s in named if s}
        lines |= {"target": self.target.name, "prompt": self.prompt}
        return lines | {"tools": ", ".join(f"{n} {v}" for n, v in tool_versions().items())}
