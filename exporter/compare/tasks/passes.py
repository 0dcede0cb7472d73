"""The two passes of a task: what every model says, then how fast each is, one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from exporter.compare.candidates import NOISE_FLOOR, Candidate
from exporter.compare.passes import Steps, noise_floor_threads
from exporter.compare.speed import SpeedPlan
from exporter.compare.tasks.jobs import TaskJob, TaskJobCase, TaskResult, run_task_job
from exporter.compare.tasks.measure import Measure
from exporter.families.tasks import Task


@dataclass(frozen=True)
class TaskSetting:
    """What all processes share; `digests` are the model folders' by name."""

    task: Task
    measure: Measure
    prompt: str
    max_new_tokens: int
    threads: int
    work: Path
    digests: Mapping[str, str]

    @cached_property
    def cases(self) -> tuple[TaskJobCase, ...]:
        """The cases with their digests."""
        return self.measure.job_cases()

    def folder(self, name: str) -> Path:
        """Where the process of that name leaves its answer."""
        return self.work.resolve() / name.replace(" ", "-")

    def threads_of(self, name: str) -> int:
        """The noise floor runs with another number of threads, and nothing else differs."""
        return noise_floor_threads(self.threads) if name == NOISE_FLOOR else self.threads

    def job(
        self, model: Candidate, name: str, role: Literal["reference", "candidate", "speed"]
    ) -> TaskJob:
        """The job of one model in one role."""
        return TaskJob(
            task=self.task,
            name=name,
            role=role,
            model_dir=str(model.model_dir.resolve()),
            model_sha256=self.digests[model.name],
            threads=self.threads_of(name),
            cases=self.cases,
            folder=str(self.folder(name)),
            labels=tuple(self.measure.labels) if self.task == "zero-shot" else (),
            template=self.prompt or None,
            texts=tuple(self.measure.texts),
            max_new_tokens=self.max_new_tokens,
        )


def quality_pass(
    models: Sequence[Candidate], setting: TaskSetting, steps: Steps
) -> dict[str, TaskResult]:
    """The reference first, then its repetition, then the candidates."""
    reference = models[0]
    first = setting.job(reference, reference.name, "reference")
    jobs = [first]
    for model, name in [(reference, NOISE_FLOOR), *((m, m.name) for m in models[1:])]:
        job = setting.job(model, name, "candidate")
        # The reference's digest is part of theirs: scores against another reference are worthless.
        jobs.append(
            msgspec.structs.replace(job, reference=first.folder, reference_job=first.digest)
        )
    results = {}
    for job in jobs:
        results[job.name] = run_task_job(
            job, lambda d, t, _what="", name=job.name: steps.follow(d, t, name)
        )
        steps.next(job.name)
    shutil.rmtree(Path(first.folder) / "logits", ignore_errors=True)
    return results


def speed_pass(
    models: Sequence[Candidate],
    setting: TaskSetting,
    plan: SpeedPlan,
    results: Mapping[str, TaskResult],
    steps: Steps,
) -> dict[str, list[TaskResult]]:
    """A B C, A B C, ...: a drift of the machine meets all candidates alike."""
    if not plan.seconds:
        return {}
    slowest = max(sum(median(times) for times in results[m.name].seconds.values()) for m in models)
    load = max(results[m.name].load_seconds for m in models) + 1.0
    count = min(plan.images(slowest, load, len(models)), len(setting.cases))
    cases = tuple(setting.cases[i * len(setting.cases) // count] for i in range(count))
    timed: dict[str, list[TaskResult]] = {m.name: [] for m in models}
    for turn in range(plan.rounds):
        for index, model in enumerate(models):
            job = setting.job(model, model.name, "speed")
            job = msgspec.structs.replace(
                job, cases=cases, texts=job.texts[:count], labels=job.labels[:count],
                folder=f"{job.folder}-speed-{turn}", repeat=turn,
            )  # fmt: skip
            timed[model.name].append(run_task_job(job))
            done = turn * len(models) + index + 1
            steps.follow(done, plan.rounds * len(models), f"speed of {model.name}")
    return timed
