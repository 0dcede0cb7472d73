"""Bundles of task models held against each other: `medexport compare` and `check`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.manifest import Manifest
from exporter.catalog.profiles import model_profiles
from exporter.catalog.schema import TaskGate
from exporter.compare.tasks.comparison import TaskComparison, compare_tasks
from exporter.core.errors import WrongUsage
from exporter.core.modelfiles import read_config
from exporter.core.progress import Progress, silent
from exporter.families.table import task_family_of
from exporter.families.tasks import Task
from exporter.pipeline.task_evaluation import open_task_evaluation


@dataclass(frozen=True)
class TaskQuestion:
    """What all models are asked: a set (None: the shipped one of the task) and `limit` of its cases."""

    evaluation: str | None
    limit: int = 0
    prompt: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None


def task_of(model_dir: Path) -> Task | None:
    """What the model of an exported folder does; None for a captioner. Raises `InputRefused`."""
    family = task_family_of(read_config(model_dir / "config.json"))
    return family.TASK if family else None


def compare_task_models(
    models: Mapping[str, Path],
    manifest: Manifest | None,
    out: Path,
    asked: TaskQuestion,
    *,
    progress: Progress = silent,
) -> TaskComparison:
    """Compare exported ``model/`` folders of one task with the first; reports go into `out`.

    Prompt, length and margins are those of `manifest`, the bundle among them, unless given. Raises
    `WrongUsage` when the models do different things.
    """
    tasks = {name: task_of(path) or "caption" for name, path in models.items()}
    task = task_of(next(iter(models.values())))
    if task is None or len(set(tasks.values())) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in tasks.items())
        raise WrongUsage(f"the models do different things: {listed}; expected one kind")
    usage = manifest.usage if manifest else None
    profile = model_profiles().get(manifest.lineage.base.name) if manifest else None
    evaluation = open_task_evaluation(
        task,
        asked.evaluation,
        limit=asked.limit,
        prompt=(usage.prompt if usage else "") if asked.prompt is None else asked.prompt,
        max_new_tokens=asked.max_new_tokens or (usage.max_new_tokens if usage else 64),
        threads=asked.threads,
        gate=profile.task_gate if profile else TaskGate(),
    )
    lineage = {"set": f"{evaluation.set_name}, sha256 {evaluation.set_digest}"}
    return compare_tasks(
        task,
        models,
        next(iter(models)),
        evaluation.cases,
        out,
        prompt=evaluation.prompt,
        max_new_tokens=evaluation.max_new_tokens,
        threads=evaluation.threads,
        gate=evaluation.gate,
        smoke=evaluation.smoke,
        lineage=lineage,
        progress=progress,
        annotations=evaluation.annotations,
    )
