"""`compare_tasks`: the reference, its noise floor and every candidate, each in its own process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import msgspec

from exporter.catalog.schema import TaskGate
from exporter.compare.candidates import NOISE_FLOOR, Candidate, check_candidates, part_bytes
from exporter.compare.junit import junit_xml
from exporter.compare.machine import machine
from exporter.compare.passes import Steps
from exporter.compare.speed import SpeedPlan
from exporter.compare.tasks.jobs import TaskResult
from exporter.compare.tasks.judge import judge_task
from exporter.compare.tasks.measure import Annotation, Measure, Measured, read_annotations
from exporter.compare.tasks.passes import TaskSetting, quality_pass, speed_pass
from exporter.compare.tasks.records import (
    TASK_SCHEMA,
    KindRow,
    TaskCase,
    TaskComparison,
    TaskRow,
    read_task_comparison,
)
from exporter.compare.tasks.report import render_task_report, shown_cases
from exporter.compare.tasks.segmentation import SegmentationMeasure
from exporter.compare.tasks.speed import memory_figures, speed_figures
from exporter.compare.tasks.summary import SummaryMeasure
from exporter.compare.tasks.text_encoder import TextEncoderMeasure
from exporter.compare.tasks.wording import method_lines, summary_line
from exporter.compare.tasks.zero_shot import ZeroShotMeasure
from exporter.core.artifact import write_atomic
from exporter.core.cases import Case
from exporter.core.digest import canonical_json, sha256_tree
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent
from exporter.core.text_cases import TextCase
from exporter.families.tasks import Task
from exporter.runtimes.tasks.zero_shot import label_texts

__all__ = ["TaskComparison", "compare_tasks", "read_task_comparison"]


@dataclass(frozen=True)
class _Found:
    """What the processes answered, by model; the noise floor's stands behind the reference's."""

    results: Mapping[str, TaskResult]
    timed: Mapping[str, Sequence[TaskResult]]
    said: Mapping[str, Any]
    measured: Mapping[str, Measured]


def compare_tasks(  # noqa: PLR0913 (each is one decision of the caller)
    task: Task,
    candidates: Mapping[str, Path],
    reference: str,
    cases: Sequence[Case] | Sequence[TextCase],
    out: Path,
    *,
    prompt: str = "",
    max_new_tokens: int = 64,
    threads: int,
    gate: TaskGate | None = None,
    smoke: bool = False,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    annotations: Path | None = None,
    speed: SpeedPlan | None = None,
) -> TaskComparison:
    """Compare exported model folders with the one named `reference`, which is among `candidates`.

    Writes compare.json, cases.jsonl, report.html and junit.xml into `out`; the processes' own files
    are in `out`/work until all are done. `prompt`: the text around a label (with ``{}``; empty: the
    model's own), for masks too; for summaries the words before each text. `annotations`: see
    `measure.read_annotations`. Raises `WrongUsage` on bad names or prompts, `InputRefused` on bad models,
    images or annotations, `EnvironmentLacks` when a process was killed.
    """
    if reference not in candidates:
        raise WrongUsage(f"no model '{reference}' to compare with; expected it among the models")
    names = [reference, *(n for n in candidates if n != reference)]
    models = [Candidate(name, candidates[name]) for name in names]
    check_candidates(models)
    if prompt and task in ("zero-shot", "segmentation"):
        label_texts(("label",), prompt)  # refuses a template without a place for it
    marked = read_annotations(annotations) if annotations else {}
    measure = open_measure(task, cases, marked)
    speed = speed or SpeedPlan(seconds=20.0)
    work = out / "work"
    setting = TaskSetting(
        task, measure, prompt, max_new_tokens, threads, work,
        {m.name: sha256_tree(m.model_dir) for m in models},
    )  # fmt: skip
    stages = len(models) + 1 + (1 if speed.seconds else 0)
    steps = Steps(progress, stages, len(cases))
    results = quality_pass(models, setting, steps)
    timed = speed_pass(models, setting, speed, results, steps)
    said = {name: measure.read(r, setting.folder(name)) for name, r in results.items()}
    measured = {
        name: measure.measure(own, said[reference], gate or TaskGate())
        for name, own in said.items()
    }
    found = _Found(results, timed, said, measured)
    comparison = _assemble(models, setting, found, gate or TaskGate(), smoke=smoke)
    pictures = _pictures(comparison, measure, said, work)
    _write(comparison, out, lineage or {}, pictures)
    shutil.rmtree(work)
    return comparison


def open_measure(
    task: Task,
    cases: Sequence[Case] | Sequence[TextCase],
    annotations: Mapping[str, Annotation],
) -> Measure:
    """The measure of a task on these cases. Raises `WrongUsage` for cases of another kind."""
    kind = Case if task in ("zero-shot", "segmentation") else TextCase
    if not cases or not all(isinstance(c, kind) for c in cases):
        what = "images" if kind is Case else "texts"
        raise WrongUsage(
            f"{len(cases)} cases for the task {task}; expected at least one, of {what}"
        )
    if len({c.id for c in cases}) != len(cases):
        raise InputRefused("two cases have the same id; give each its own")
    if task == "zero-shot":
        return ZeroShotMeasure(cast(Sequence[Case], cases), annotations)
    if task == "segmentation":
        return SegmentationMeasure(cast(Sequence[Case], cases), annotations)
    if task == "text-encoder":
        return TextEncoderMeasure(cast(Sequence[TextCase], cases))
    return SummaryMeasure(cast(Sequence[TextCase], cases))


def _assemble(
    models: Sequence[Candidate],
    setting: TaskSetting,
    found: _Found,
    gate: TaskGate,
    *,
    smoke: bool,
) -> TaskComparison:
    reference, measure = models[0].name, setting.measure
    known = {m.name: m for m in models} | {NOISE_FLOOR: models[0]}
    subjects = measure.subjects
    patients = [s.patient for s in subjects]
    judged = [*(m.name for m in models[1:]), NOISE_FLOOR]
    kinds = [s.kind for s in subjects]
    made = TaskComparison(
        schema=TASK_SCHEMA,
        task=setting.task,
        summary="",
        reference=reference,
        unit=measure.unit,
        prompt=setting.prompt,
        labels=tuple(measure.labels),
        count=len(subjects),
        patients=len(set(patients)),
        kinds={k: kinds.count(k) for k in sorted(set(kinds))},
        machine=machine(setting.threads),
        method=method_lines(setting.threads, found.timed) | measure.method(),
        rows=tuple(_row(known[name], name, models[0], setting, found) for name in found.results),
        gates=tuple(
            judge_task(
                name, reference, found.measured[name], patients, gate, unit=measure.unit, smoke=smoke
            )
            for name in judged
        ),
        cases=tuple(
            TaskCase(
                id=s.id, patient=s.patient, kind=s.kind, sha256=case.sha256,
                image=str(s.image) if s.image else None, text=s.text, truth=dict(s.truth),
                answers={name: m.answers[i] for name, m in found.measured.items()},
            )
            for i, (s, case) in enumerate(zip(subjects, setting.cases, strict=True))
        ),
    )  # fmt: skip
    return msgspec.structs.replace(made, summary=summary_line(made))


def _row(
    model: Candidate, name: str, reference: Candidate, setting: TaskSetting, found: _Found
) -> TaskRow:
    parts, measured = part_bytes(model), found.measured[name]
    whole = sum(parts.values())
    first, timed = name == reference.name, found.timed.get(name, ())
    return TaskRow(
        name=name,
        role="reference" if first else "noise floor" if name == NOISE_FLOOR else "candidate",
        threads=setting.threads_of(name),
        model_sha256=setting.digests[model.name],
        versions=found.results[name].versions,
        parts=parts,
        bytes=whole,
        ratio=whole / sum(part_bytes(reference).values()),
        figures=dict(measured.figures),
        differences={} if first else dict(measured.differences),
        labels=dict(measured.labels),
        kinds={} if first else _kinds(setting.measure, measured),
        speed=speed_figures(timed, setting.threads) if timed else None,
        memory=memory_figures(timed) if timed else None,
    )


def _kinds(measure: Measure, measured: Measured) -> dict[str, KindRow]:
    rows = {}
    for kind in sorted({s.kind for s in measure.subjects}):
        places = [i for i, s in enumerate(measure.subjects) if s.kind == kind]
        moved = [measured.answers[i].distance for i in places]
        rows[kind] = KindRow(
            count=len(places),
            patients=len({measure.subjects[i].patient for i in places}),
            changed=sum(bool(measured.answers[i].changes) for i in places),
            distance=fmean(moved),
            worst=max(moved),
        )
    return rows


def _pictures(
    comparison: TaskComparison, measure: Measure, said: Mapping[str, Any], work: Path
) -> dict[str, dict[str, Path]]:
    """Pictures of the cases that the report shows, by candidate and case id."""
    if measure.draw is None:
        return {}
    drawn = {}
    for row in comparison.rows:
        if row.role == "candidate":
            folder = work / f"pictures-{row.name}"
            folder.mkdir()
            shown = [c.id for c in shown_cases(comparison, row.name)]
            drawn[row.name] = measure.draw(
                said[row.name], said[comparison.reference], shown, folder
            )
    return drawn


def _write(
    comparison: TaskComparison,
    out: Path,
    lineage: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, Path]],
) -> None:
    bare = msgspec.structs.replace(comparison, cases=())
    write_atomic(out / "compare.json", canonical_json(msgspec.to_builtins(bare)))
    # A path of this machine says nothing elsewhere: the files hold the image's name only.
    rows = [
        msgspec.structs.replace(c, image=Path(c.image).name if c.image else None)
        for c in comparison.cases
    ]
    write_atomic(out / "cases.jsonl", b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    write_atomic(out / "report.html", render_task_report(comparison, lineage, pictures).encode())
    write_atomic(out / "junit.xml", junit_xml(*comparison.gates))
