"""On which inputs models of the task families are compared, and the comparison itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.calibrate.sets import open_set
from exporter.calibrate.textset import open_text_set
from exporter.catalog.schema import TaskGate
from exporter.core.cases import Case
from exporter.core.digest import canonical_json, sha256_file, sha256_json
from exporter.core.progress import Progress, silent
from exporter.core.text_cases import TextCase
from exporter.families.tasks import Task
from exporter.pipeline.evaluation import IMAGES, REFERENCE, spread
from exporter.runtimes.threads import usable_cores

if TYPE_CHECKING:
    from exporter.compare.tasks.comparison import TaskComparison

# What a task is compared on where nothing is given.
TEXTS = "reports-eval"
# Beside set.json, a line per case: id, labels (name: true or false), masks (label: file).
ANNOTATIONS = "annotations.jsonl"
SETS: Mapping[Task, str] = {
    "zero-shot": IMAGES,
    "segmentation": IMAGES,
    "text-encoder": TEXTS,
    "summary": TEXTS,
}


@dataclass(frozen=True)
class TaskEvaluation:
    """The images or texts that models are run on, and how.

    `annotations`: labels and masks of the images, where the set has them; `set_digest` covers them.
    """

    task: Task
    set_name: str
    set_digest: str
    cases: tuple[Case, ...] | tuple[TextCase, ...]
    prompt: str
    max_new_tokens: int
    threads: int
    gate: TaskGate
    smoke: bool
    annotations: Path | None = None


def open_task_evaluation(
    task: Task,
    name: str | None,
    *,
    limit: int = 0,
    prompt: str = "",
    max_new_tokens: int = 64,
    threads: int | None = None,
    gate: TaskGate | None = None,
) -> TaskEvaluation:
    """A set by name or folder (None: the shipped one of the task), with `limit` of its cases (0: all).

    Raises `WrongUsage` when there is no such set, `InputRefused` when it was changed.
    """
    found = name or SETS[task]
    annotations: Path | None = None
    cases: tuple[Case, ...] | tuple[TextCase, ...]
    if SETS[task] == TEXTS:
        texts = open_text_set(found)
        title, digest = texts.name, texts.digest
        cases = texts.samples[:limit] if limit else texts.samples
    else:
        images = open_set(found)
        cases = spread(images.cases(), limit)
        found_at = images.samples[0].image_path.parent.parent / ANNOTATIONS
        annotations = found_at if found_at.is_file() else None
        title, digest = images.name, _with_annotations(images.digest, annotations)
    return TaskEvaluation(
        task=task,
        set_name=title,
        set_digest=digest,
        cases=cases,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        threads=threads or usable_cores(),
        gate=gate or TaskGate(),
        smoke=limit > 0,
        annotations=annotations,
    )


def _with_annotations(digest: str, annotations: Path | None) -> str:
    """The set's digest, with what the annotations and their masks hold."""
    if annotations is None:
        return digest
    from exporter.compare.tasks.measure import read_annotations

    masks = {
        name: {label: sha256_file(Path(mask)) for label, mask in line.masks.items()}
        for name, line in read_annotations(annotations).items()
    }
    return sha256_json({"set": digest, "annotations": sha256_file(annotations), "masks": masks})


def check_task(
    merged: Path,
    fp32: Path,
    candidates: Mapping[str, tuple[Path, Path]],
    out: Path,
    evaluation: TaskEvaluation,
    *,
    progress: Progress = silent,
) -> None:
    """Parity of every graph with torch on random and real inputs; writes parity.json into `out`."""
    from exporter.compare.graph_parity import check_graph_parity
    from exporter.pipeline.stages import PARITY

    inputs: list[Case] | list[str] = [c for c in evaluation.cases if isinstance(c, Case)]
    if not inputs:
        inputs = [c.text for c in evaluation.cases if isinstance(c, TextCase)]
    report = check_graph_parity(
        merged,
        fp32 / "model",
        {n: (quantized, exported / "model") for n, (quantized, exported) in candidates.items()},
        inputs,
        threads=evaluation.threads,
        progress=progress,
    )
    (out / PARITY).write_bytes(canonical_json(report))


def compare_task(
    reference: Path,
    candidates: Mapping[str, Path],
    out: Path,
    evaluation: TaskEvaluation,
    *,
    lineage: Mapping[str, Any],
    progress: Progress = silent,
) -> TaskComparison:
    """Compare exported folders with the reference; writes compare.json, cases.jsonl, report.html."""
    from exporter.compare.tasks.comparison import compare_tasks

    rows = {REFERENCE: reference / "model"} | {n: p / "model" for n, p in candidates.items()}
    return compare_tasks(
        evaluation.task,
        rows,
        REFERENCE,
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
