"""The stages that look at what was made: parity with torch, comparison with the reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from exporter.core.progress import Progress
from exporter.pipeline import stages as do
from exporter.pipeline.evaluation import Evaluation, compare_exported
from exporter.pipeline.job import Build
from exporter.pipeline.stage import Artifact
from exporter.pipeline.task_evaluation import TaskEvaluation, check_task, compare_task
from exporter.quantizers.schemes import Scheme

# Stands behind the name of float weights that are computed in float16.
HALF = "half"


def pair(
    b: Build, quantized: Mapping[str, Artifact], exported: Mapping[str, Artifact]
) -> dict[str, tuple[Artifact, Artifact]]:
    """Quantized and exported artifact of each scheme that quantizes, by its name."""
    return {
        b.schemes[n].name: (quantized[n], exported[n]) for n in quantized if b.schemes[n].quantizes
    }


def check_parity(
    b: Build,
    evaluation: Evaluation | TaskEvaluation,
    merged: Artifact,
    fp32: Artifact,
    pairs: Mapping[str, tuple[Artifact, Artifact]],
) -> Artifact:
    """Every graph against torch with the same weights."""
    folders = {
        name: (quantized.path, exported.path) for name, (quantized, exported) in pairs.items()
    }

    def make(folder: Path, progress: Progress) -> None:
        if isinstance(evaluation, TaskEvaluation):
            check_task(merged.path, fp32.path, folders, folder, evaluation, progress=progress)
            return
        do.check_graphs_against_torch(
            merged.path, fp32.path, folders, folder, evaluation, progress=progress
        )

    return b.stages.run(
        "verify",
        make,
        version=1,
        parents=[merged.key, fp32.key, *(exported.key for _, exported in pairs.values())],
        options=evaluation_options(evaluation),
        detail="graphs against torch",
    )


def compare(
    b: Build,
    evaluation: Evaluation | TaskEvaluation,
    reference: Artifact,
    exported: Mapping[str, Artifact],
) -> Artifact:
    """All schemes against the float16 model, on the evaluation set."""
    rows = {_row_name(b.schemes[n]): e for n, e in exported.items() if e.key != reference.key}
    options = evaluation_options(evaluation)
    if isinstance(evaluation, Evaluation):
        options["robustness"] = evaluation.robustness

    def make(folder: Path, progress: Progress) -> None:
        paths = {name: artifact.path for name, artifact in rows.items()}
        if isinstance(evaluation, TaskEvaluation):
            compare_task(
                reference.path,
                paths,
                folder,
                evaluation,
                lineage=b.lineage_lines(),
                progress=progress,
            )
            return
        compare_exported(
            reference.path,
            paths,
            folder,
            evaluation,
            lineage=b.lineage_lines(),
            scratch=b.stages.work / "compare.scratch",
            progress=progress,
        )

    return b.stages.run(
        "compare",
        make,
        version=3,
        parents=[reference.key, *(artifact.key for artifact in rows.values())],
        options=options,
        detail=f"{', '.join(rows) or 'the reference alone'} with fp16",
    )


def _row_name(scheme: Scheme) -> str:
    """A scheme that stores what the reference does and is here nevertheless computes otherwise."""
    return scheme.name if scheme.quantizes else f"{scheme.name}-{HALF}"


def evaluation_options(evaluation: Evaluation | TaskEvaluation) -> dict[str, Any]:
    """What a stage that runs the models depends on."""
    return {
        "set": evaluation.set_digest,
        "cases": [c.id for c in evaluation.cases],
        "prompt": evaluation.prompt,
        "tokens": evaluation.max_new_tokens,
        "threads": evaluation.threads,
        "gate": msgspec.to_builtins(evaluation.gate),
        "smoke": evaluation.smoke,
    }
