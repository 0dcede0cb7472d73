"""What the user asks for, before anything is looked up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.catalog.schema import ModelProfile
from exporter.core.errors import WrongUsage


@dataclass(frozen=True)
class BuildRequest:
    """Arguments of `medexport build`.

    `also` names further schemes that are built and compared but not packaged; `limit` bounds the
    number of evaluation cases (0: all), `robustness` of them are also perturbed; `compare` False leaves
    parity and comparison out, which the bundle then says. `dialect` and `compute`: of the graphs, as for `graphs.export.export_model`. `max_size`
    and `max_kl` are the budget of a mixed scheme, as in `read_budget`. `modality_aware`: the profile's
    instruction that names each image's modality.
    """

    model: str
    scheme: str
    out: Path
    weights: Path | None = None
    adapters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    target: str = "auto"
    evaluation: str | None = None
    calibration: str | None = None
    calibration_samples: int = 128
    calibration_seed: int = 0
    max_size: str | None = None
    max_kl: float | None = None
    prompt: str | None = None
    modality_aware: bool = False
    work: Path | None = None
    offline: bool = False
    resume: bool = True
    threads: int | None = None
    limit: int = 0
    compare: bool = True
    robustness: int = 0
    sign_key: Path | None = None
    dialect: Literal["ort", "standard"] = "ort"
    compute: Literal["float32", "float16"] = "float32"

    def instruction(self, profile: ModelProfile) -> str:
        """What is asked with each image: `prompt`, else the profile's. Raises `WrongUsage` where a
        modality-aware one is asked for and the profile has none.
        """
        if not self.modality_aware:
            return self.prompt or profile.prompts.default
        if self.prompt or not profile.prompts.modality_aware:
            why = "--prompt is given too" if self.prompt else f"{profile.title} has no such prompt"
            raise WrongUsage(
                f"--modality-aware: {why}; give --prompt alone, with {{modality}} in it"
            )
        return profile.prompts.modality_aware

    @property
    def work_folder(self) -> Path:
        """Where the stages' artifacts lie: beside the bundle unless told otherwise."""
        return self.work or self.out.with_name(f"{self.out.name}.work")
