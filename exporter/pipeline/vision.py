"""Image features of a vision part in other bits, by its real graph."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.cases import Case, prompt_for
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.table import family_of
from exporter.graphs.parts import write_vision
from exporter.graphs.weights import WeightSource
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.run import write_planned
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import image_rows
from exporter.runtimes.ort_session import open_session

GRAPH = "vision_encoder.onnx"


@dataclass(frozen=True)
class VisionVariants:
    """Runs the vision part of `merged` as a plan would store it, on the images of prompts.

    `exported`: a folder with the model's tokenizer and settings; `scratch`: for the graph, which is
    removed again.
    """

    merged: Path
    exported: Path
    cases: Sequence[Case]
    prompt: str
    scratch: Path
    threads: int

    def features(self, plan: Sequence[LayerPlan]) -> list[NDArray[np.float32]]:
        """Feature rows ``[rows, hidden]`` of each case; `plan` has the vision part's tensors alone.

        Activations are float32, as in the exported graph. Raises `InputRefused` as export does.
        """
        config = read_config(self.merged / "config.json")
        family = family_of(config)
        preparer = family.open_preparer(self.exported)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        write_planned(
            Checkpoint.open(self.merged), plan, self.scratch, "vision", threads=self.threads
        )
        weights = WeightSource(self.scratch, "float16")
        write_vision(self.scratch, family.tower_spec(config), weights, 0)
        session = open_session(self.scratch / GRAPH, self.threads)
        found = []
        for case in self.cases:
            asked = prompt_for(self.prompt, case.modality)
            inputs = preparer.prepare([open_image(case.image)], asked)
            found.append(image_rows(session, inputs))
        shutil.rmtree(self.scratch)
        return found
