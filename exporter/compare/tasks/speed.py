"""Latency of each step and memory, from the processes of the speed pass."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from exporter.compare import speed
from exporter.compare.jobs import JobResult
from exporter.compare.records import Memory
from exporter.compare.statistics import early_stopping_percentile
from exporter.compare.tasks.jobs import TaskResult
from exporter.compare.tasks.records import Latency, TaskSpeed


def speed_figures(results: Sequence[TaskResult], threads: int) -> TaskSpeed:
    """Medians over all cases of one model's processes, in milliseconds."""
    steps = list(results[0].seconds)
    return TaskSpeed(
        rounds=len(results),
        threads=threads,
        load=median(r.load_seconds for r in results) * 1000,
        steps={s: _latency([t * 1000 for r in results for t in r.seconds[s]]) for s in steps},
    )


def memory_figures(results: Sequence[TaskResult]) -> Memory:
    """As those of captioners: medians over the processes, the larger of loading and running."""
    return speed.memory_figures([
        JobResult(
            job=r.job, load_seconds=r.load_seconds, peak_load=r.peak_load, peak_run=r.peak_run,
            unique=r.unique, peak_was_reset=r.peak_was_reset, versions=r.versions, cases=[],
        )
        for r in results
    ])  # fmt: skip


def _latency(times: Sequence[float]) -> Latency:
    ordered = sorted(times)
    middle, quarter = median(ordered), len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / middle if middle else 0.0
    return Latency(len(ordered), middle, early_stopping_percentile(ordered, 0.9), spread)
