"""How a task's figures and verdicts are put into words: the same in table, report and summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from exporter.compare.candidates import NOISE_FLOOR
from exporter.compare.passes import noise_floor_threads
from exporter.compare.records import Figure
from exporter.compare.statistics import RESAMPLES, SEED
from exporter.compare.tasks.jobs import TaskResult
from exporter.compare.tasks.records import TaskComparison, TaskRow
from exporter.compare.verdict import ENOUGH_IMAGES
from exporter.compare.wording import DASH, small

TITLES = {
    "zero-shot": "Zero-shot classification and retrieval",
    "segmentation": "Text-prompted segmentation",
    "text-encoder": "Text encoder",
    "summary": "Summaries",
}


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once, numbers by their value: recall@5 before recall@10.

    compare.json sorts its keys, so that a comparison that was read has no other order.
    """

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]

    return sorted(set(names), key=key)


def shown(figure: Figure | None, *, signed: bool = False, bounds: bool = True) -> str:
    """A figure with four digits and, if it has one, its interval."""
    if figure is None:
        return DASH
    if figure.low is None and figure.value == round(figure.value):
        return f"{figure.value:.0f}"  # a count, or a worst case that is none
    text = _digits(figure.value, signed=signed)
    if not bounds or figure.low is None or figure.high is None:
        return text
    return f"{text} [{_digits(figure.low, signed=signed)}, {_digits(figure.high, signed=signed)}]"


def _digits(value: float, *, signed: bool) -> str:
    if 0.9995 < value < 1:
        return f"1 - {small(1 - value)}"
    text = f"{value:.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"
    return f"+{text}" if signed and value >= 0 else text


def candidates_of(comparison: TaskComparison) -> list[TaskRow]:
    """The rows that were put beside the reference."""
    return [row for row in comparison.rows if row.role == "candidate"]


def smoke_note(comparison: TaskComparison) -> str:
    """Says so when there are too few cases to exclude a rate of 2 per cent."""
    if comparison.count >= ENOUGH_IMAGES:
        return ""
    return (
        f" (a smoke test: {comparison.count} {comparison.unit}; {ENOUGH_IMAGES} without a change "
        "would be needed to show a rate under 2 %)"
    )


def summary_line(comparison: TaskComparison) -> str:
    """One line on all candidates, for manifests and cards."""
    verdicts = {g.candidate: g.label for g in comparison.gates}
    said = []
    for row in candidates_of(comparison):
        parts = [f"{100 * row.ratio:.0f} % of the bytes"]
        parts += [f"{n} {shown(f, bounds=False)}" for n, f in list(row.figures.items())[:4]]
        said.append(f"{verdicts[row.name]}: {row.name} {', '.join(parts)}")
    return (
        f"{comparison.task} against {comparison.reference} on {comparison.count} {comparison.unit} "
        f"of {comparison.patients} patients: {'; '.join(said) or 'the reference alone'}"
        f"{smoke_note(comparison)}"
    )


def method_lines(threads: int, timed: Mapping[str, Sequence[TaskResult]]) -> dict[str, str]:
    """How the figures of every task were measured, by figure."""
    lines = {
        "processes": f"every model in processes of its own, one at a time, {threads} threads",
        NOISE_FLOOR: (
            f"the reference once more in a fresh process with {noise_floor_threads(threads)} instead "
            f"of {threads} threads; nothing else differs"
        ),
        "intervals": (
            f"95 %, percentile bootstrap over patients, {RESAMPLES:,} resamples, seed {SEED}; "
            "differences are paired; figures that are no means enter by their influence per case"
        ),
        "gate": (
            "margins from the profile, fixed before the run; one-sided 95 % bounds: exact for shares "
            "(on the effective number of cases where a patient's cases are alike), studentised "
            "bootstrap over patients for means; PASS: all bounds inside, FAIL: a whole interval "
            "outside, else INCONCLUSIVE"
        ),
        "bytes": "files of the model folder, graphs with their external data",
        "speed": "not measured",
    }
    if timed:
        results = next(iter(timed.values()))
        lines["speed"] = (
            f"{len(results)} rounds in the order {' '.join(timed)}, each process warmed up; medians "
            "per case; p90 by MLPerf early stopping, only from 64 runs; opening the file is not in it"
        )
        lines["memory"] = "peak resident set (VmHWM) of those processes"
    return lines
