"""The speed pass: every candidate alone on the machine, in turn, several rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from exporter.compare.gpu import GpuUse
from exporter.compare.jobs import JobResult
from exporter.compare.records import Memory, Speed
from exporter.compare.statistics import early_stopping_percentile

NOISY = 0.2


@dataclass(frozen=True)
class SpeedPlan:
    """How much time to spend: `rounds` of A B C, about `seconds` together, 3 to 22 images each.

    Three rounds of 22 images are 66 runs: enough for a p90 (64). `seconds` 0 leaves the pass out.
    """

    rounds: int = 3
    seconds: float = 60.0
    fewest: int = 3
    most: int = 22

    def images(self, caption: float, load: float, candidates: int) -> int:
        """Images per process from the seconds one caption and one start took."""
        share = self.seconds / (self.rounds * candidates)
        return max(self.fewest, min(self.most, int((share - load) / max(caption, 1e-6)) - 1))


def speed_figures(results: Sequence[JobResult], threads: int) -> Speed:
    """Medians over all captions of one candidate's processes."""
    runs = [case for result in results for case in result.cases]
    totals = [r.total * 1000 for r in runs]
    firsts = [r.first_token * 1000 for r in runs]
    steps = [sum(r.decode) / len(r.decode) * 1000 for r in runs if r.decode]
    per_token = median(steps) if steps else None
    ordered = sorted(totals)
    quarter = len(ordered) // 4
    middle = median(totals)
    return Speed(
        runs=len(runs),
        rounds=len(results),
        images=len(results[0].cases),
        threads=threads,
        prepare=median(r.prepare for r in runs) * 1000,
        vision=median(r.vision for r in runs) * 1000,
        first_token=median(firsts),
        per_token=per_token,
        tokens_per_second=1000 / per_token if per_token else None,
        total=middle,
        first_token_p90=early_stopping_percentile(firsts, 0.9),
        total_p90=early_stopping_percentile(totals, 0.9),
        spread=(ordered[-1 - quarter] - ordered[quarter]) / middle if middle else 0.0,
        load=median(r.load_seconds for r in results) * 1000,
    )


def memory_figures(results: Sequence[JobResult]) -> Memory:
    """Medians over the processes; the peak is the larger of loading and running."""
    peaks = [
        max(r.peak_load, r.peak_run)
        for r in results
        if r.peak_load is not None and r.peak_run is not None
    ]
    loads = [r.peak_load for r in results if r.peak_load is not None]
    uniques = [r.unique for r in results if r.unique is not None]
    return Memory(
        processes=len(results),
        peak=int(median(peaks)) if peaks else None,
        peak_load=int(median(loads)) if loads else None,
        unique=int(median(uniques)) if uniques else None,
        peak_was_reset=all(r.peak_was_reset for r in results),
        gpu=gpu_figures(results),
    )


def gpu_figures(results: Sequence[JobResult]) -> GpuUse | None:
    """Medians over the processes of what each said; None where none ran on a GPU."""
    said = [r.gpu for r in results if r.gpu is not None]
    if not said:
        return None

    def middle(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return median(known) if known else None

    def whole(values: Iterable[int | None]) -> int | None:
        found = middle(values)
        return None if found is None else int(found)

    return GpuUse(
        process=whole(u.process for u in said),
        device=whole(u.device for u in said),
        allocated=whole(u.allocated for u in said),
        reserved=whole(u.reserved for u in said),
        watts=middle(u.watts for u in said),
        joules=middle(u.joules for u in said),
        joules_per_token=middle(u.joules_per_token for u in said),
    )
