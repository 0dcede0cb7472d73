"""The two passes: what every model says, then how fast each is, one process after another."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import msgspec

from exporter.catalog.schema import Gate
from exporter.compare.candidates import NOISE_FLOOR, Candidate
from exporter.compare.caption_figures import MetricsAsked
from exporter.compare.jobs import Job, JobCase, JobResult, Role, finished, run_job
from exporter.compare.predictions import predicted_result
from exporter.compare.speed import SpeedPlan
from exporter.core.progress import Progress


@dataclass(frozen=True)
class Plan:
    """How much is measured, and the margins that the verdict holds the figures to.

    `probes` cases are also captioned with their image blanked, `perturbed` cases with it slightly
    changed (see `perturb`; 0: none, it costs 5 captions each); `logits_bytes` is the disk space for
    the reference's logits; `noise_floor`: run the reference twice; `smoke`: a quick look, whatever the
    number of images; `metrics`: which caption metrics, the built-in ones unless asked.
    """

    speed: SpeedPlan = field(default_factory=SpeedPlan)
    logits_bytes: int = 4 << 30
    probes: int = 64
    perturbed: int = 0
    noise_floor: bool = True
    gate: Gate = field(default_factory=Gate)
    smoke: bool = False
    metrics: MetricsAsked = field(default_factory=MetricsAsked)


@dataclass(frozen=True)
class Setting:
    """What all jobs share."""

    cases: tuple[JobCase, ...]
    prompt: str
    max_new_tokens: int
    threads: int
    work: Path
    digests: Mapping[str, str]
    reference_bytes: int

    def job(
        self,
        candidate: Candidate,
        role: Role,
        label: str,
        **more: str | int,
    ) -> Job:
        """The job of one model in one role; `more` are further fields of `Job`."""
        base = Job(
            name=label,
            role=role,
            runtime=candidate.runtime,
            model_dir=str(candidate.model_dir.resolve()),
            model_sha256=self.digests[candidate.name],
            threads=self.threads,
            device=candidate.device,
            dtype=candidate.dtype,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            cases=self.cases,
            folder=str(self.work.resolve() / label.replace(" ", "-")),
        )
        return msgspec.structs.replace(base, **more)


class Steps:
    """Adds up the progress of several processes."""

    def __init__(self, progress: Progress, stages: int, each: int) -> None:
        self._progress, self._total, self._each, self._stage = progress, stages * each, each, 0

    def follow(self, done: int, total: int, what: str) -> None:
        """Report `done` of `total` steps of the present stage."""
        here = self._stage * self._each + min(self._each, done * self._each // max(total, 1))
        self._progress(here, self._total, what)

    def next(self, what: str) -> None:
        """Report that the present stage is done."""
        self._stage += 1
        self._progress(self._stage * self._each, self._total, what)


def quality_pass(
    candidates: Sequence[Candidate], setting: Setting, plan: Plan, steps: Steps
) -> dict[str, JobResult]:
    """Captions and logits: the reference first, then its repetition, then the candidates."""
    reference = candidates[0]
    probes = min(plan.probes, len(setting.cases))
    asked = {"probes": probes, "perturbed": min(plan.perturbed, len(setting.cases))}
    first = setting.job(
        reference, "reference", reference.name, logits_bytes=plan.logits_bytes, **asked
    )
    other = replace(setting, threads=noise_floor_threads(setting.threads))
    # The reference's digest is part of theirs: scores against another reference are worthless.
    against: dict[str, str | int] = {
        "reference": first.folder, "reference_job": first.digest, **asked,
    }  # fmt: skip
    jobs = [other.job(reference, "candidate", NOISE_FLOOR, **against)] if plan.noise_floor else []
    models = [c for c in candidates[1:] if c.runtime != "predictions"]
    jobs += [setting.job(c, "candidate", c.name, **against) for c in models]
    logits = Path(first.folder) / "logits"
    open_jobs = any(finished(job) is None for job in jobs)
    if open_jobs and not logits.is_dir():
        (Path(first.folder) / "result.json").unlink(missing_ok=True)
    results = {}
    for job in (first, *jobs):
        results[job.name] = run_job(
            job, lambda d, t, _what="", name=job.name: steps.follow(d, t, name)
        )
        steps.next(job.name)
    for candidate in candidates:
        if candidate.runtime == "predictions":
            results[candidate.name] = predicted_result(
                candidate.model_dir, results[reference.name], reference.model_dir
            )
            steps.next(candidate.name)
    # The results stay for a later run; the logits are large and nobody needs them any more.
    shutil.rmtree(logits, ignore_errors=True)
    return results


def noise_floor_threads(threads: int) -> int:
    """The thread count of the reference's repetition: one, or two where one is the normal count."""
    return 1 if threads > 1 else 2


def speed_pass(
    candidates: Sequence[Candidate],
    setting: Setting,
    plan: SpeedPlan,
    results: Mapping[str, JobResult],
    steps: Steps,
) -> dict[str, list[JobResult]]:
    """A B C, A B C, ...: a drift of the machine meets all candidates alike."""
    if not plan.seconds:
        return {}
    candidates = [c for c in candidates if c.runtime != "predictions"]
    slowest = max(median(c.total for c in results[x.name].cases) for x in candidates)
    load = max(results[x.name].load_seconds for x in candidates) + 1.0
    count = min(plan.images(slowest, load, len(candidates)), len(setting.cases))
    some = replace(
        setting,
        cases=tuple(setting.cases[i * len(setting.cases) // count] for i in range(count)),
    )
    timed: dict[str, list[JobResult]] = {c.name: [] for c in candidates}
    total = plan.rounds * len(candidates)
    for turn in range(plan.rounds):
        for index, candidate in enumerate(candidates):
            job = some.job(candidate, "speed", candidate.name)
            job = msgspec.structs.replace(job, folder=f"{job.folder}-speed-{turn}", repeat=turn)
            timed[candidate.name].append(run_job(job))
            steps.follow(turn * len(candidates) + index + 1, total, f"speed of {candidate.name}")
    return timed
