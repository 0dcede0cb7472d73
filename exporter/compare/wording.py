"""How figures are put into words: the same in the table, the report and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from exporter.compare.candidates import NOISE_FLOOR
from exporter.compare.records import Comparison, Figure, Row
from exporter.compare.speed import NOISY
from exporter.compare.statistics import RESAMPLES, SEED
from exporter.compare.verdict import ENOUGH_IMAGES, Judged, Quantity

DASH = "-"
MOST_REASONS = 3
AnyJudged = TypeVar("AnyJudged", bound=Judged)


def megabytes(count: int | None) -> str:
    """Bytes as decimal megabytes."""
    return DASH if count is None else f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash for one that was not measured."""
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; never rounded up to 100."""
    if value is None:
        return DASH
    shown = f"{100 * value:.{digits}f}"
    if float(shown) == 100 and value < 1:
        shown = f"{100 - 10**-digits:.{digits}f}"
    return f"{shown}%"


def small(value: float | None) -> str:
    """A small positive number with three significant digits."""
    if value is None:
        return DASH
    return "0" if value == 0 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"


def interval(
    figure: Figure, *, share: bool = False, signed: bool = False, cases: bool = True
) -> str:
    """A value with its interval and, unless not wanted, the cases behind it."""

    def one(value: float | None) -> str:
        if value is None:
            return "unknown"
        text = f"{100 * value:.1f}" if share else f"{value:.3f}"
        return f"+{text}" if signed and value >= 0 else text

    unit = " %" if share else ""
    said = f"{one(figure.value)}{unit} [{one(figure.low)}, {one(figure.high)}]"
    return said + (f" ({figure.images} images, {figure.patients} patients)" if cases else "")


def bound_text(quantity: Quantity) -> str:
    """A quantity with its one-sided bounds and its margin, such as "1.2 % [.., 2.9 %], allowed 2 %"."""

    def one(value: float | None) -> str:
        if value is None:
            return "unbounded"
        return f"{100 * value:.1f} %" if quantity.share else f"{value:.3g}"

    # What must not happen at all has no interval.
    inside = "" if quantity.at_most == 0 else f" [{one(quantity.low)}, {one(quantity.high)}]"
    margins = [
        f"{word} {one(limit)}"
        for word, limit in (("at least", quantity.at_least), ("at most", quantity.at_most))
        if limit is not None
    ]
    return f"{one(quantity.value)}{inside}, allowed {' and '.join(margins)}"


def shown_gates(gates: Sequence[AnyJudged]) -> list[AnyJudged]:
    """The verdicts on the candidates; where there is none, the one on the reference's repetition."""
    candidates = [gate for gate in gates if gate.candidate != NOISE_FLOOR]
    return candidates or list(gates)


def verdict_lines(report: Judged) -> list[str]:
    """The verdict, its reasons and what would decide it: first in every output."""
    lines = [f"{report.label}: {report.candidate} against {report.reference}"]
    shown = report.reasons[:MOST_REASONS]
    lines += [f"  {'because' if i == 0 else 'and'} {r}" for i, r in enumerate(shown)]
    if len(report.reasons) > len(shown):
        lines.append(f"  and {len(report.reasons) - len(shown)} more")
    if report.verdict == "INCONCLUSIVE":
        count, unit = report.counted()
        more = (
            f"{report.needed} {unit} would decide it, if it goes on as seen"
            if report.needed
            else f"no number of {unit} can be named that would decide it"
        )
        lines.append(f"  {count} {unit} of {report.patients} patients; {more}")
    return lines


def flips(row: Row) -> str:
    """Flipped facts and the images they are on."""
    if row.moved is None:
        return DASH
    images = round(row.moved.flips.value * row.moved.flips.images)
    return f"{row.moved.flipped} in {images}"


def summary_line(comparison: Comparison) -> str:
    """One line on all candidates, for manifests and cards."""
    verdicts = {g.candidate: f"{g.label}: " for g in comparison.gates}
    said = [
        verdicts.get(row.name, "") + _summary(row)
        for row in comparison.rows
        if row.role == "candidate"
    ]
    body = "; ".join(said) if said else "the reference alone"
    return (
        f"against {comparison.reference} on {comparison.images} images of "
        f"{comparison.patients} patients: {body}{smoke_note(comparison)}"
    )


def smoke_note(comparison: Comparison) -> str:
    """Says so when there are too few images to exclude a flip rate of 2 per cent."""
    if comparison.images >= ENOUGH_IMAGES:
        return ""
    return (
        f" (a smoke test: {comparison.images} images; {ENOUGH_IMAGES} without a flip would be needed "
        "to show a flip rate under 2 %)"
    )


def _summary(row: Row) -> str:
    parts = [f"{100 * row.ratio:.0f} % of the bytes"]
    if row.moved:
        images = round(row.moved.flips.value * row.moved.flips.images)
        parts.append(
            f"{row.moved.flipped} facts flipped on {images} images" if images else "no fact flipped"
        )
    if row.truth:
        parts.append(f"facts right {percent(row.truth.recall.value)}")
    if row.distribution:
        parts.append(f"KL {small(row.distribution.kl_mean)}")
        parts.append(f"top-1 {percent(row.distribution.top1_agreement, 2)}")
    return f"{row.name} {', '.join(parts)}"


def method_lines(rows: Sequence[Row], threads: int, floor_threads: int) -> dict[str, str]:
    """How each figure of these rows was measured, by figure."""
    lines = {
        "processes": f"every model in processes of its own, one at a time, {threads} threads",
        NOISE_FLOOR: (
            f"the reference once more in a fresh process with {floor_threads} instead of {threads} "
            "threads; nothing else differs"
        ),
        "captions": "greedy; same images, same prompt, same length limit for all",
        "distribution": (
            "teacher-forced: each model reads the image, the prompt and the reference's own tokens; "
            "KL(reference || candidate) in nats in float64; standard error clustered by image"
        ),
        "rouge1": "ROUGE-1 F, lowercase, no stemmer, mean over images with a ground-truth caption",
        "facts": (
            "rule-based extraction from the texts (modality, anatomy, finding with negation, device, "
            "side, severity, measurement); right: stated by ground truth and model alike"
        ),
        "flips": (
            "against the reference's own captions: other side, present for absent, other number, "
            "other severity, other device or modality; Clopper-Pearson interval over images"
        ),
        "intervals": (
            f"95 %, percentile bootstrap over patients, {RESAMPLES:,} resamples, seed {SEED}; "
            "differences are paired by image"
        ),
        "gate": (
            "margins from the profile, fixed before the run; one-sided 95 % bounds: Tango's score "
            "interval for paired shares, exact for flips (both on the effective number of images where "
            "a patient's images are alike), studentised bootstrap over patients for means; PASS: all "
            "bounds inside, FAIL: a whole interval outside, else INCONCLUSIVE"
        ),
        "image use": (
            "the same prompt with a gray image of the same size, on up to 64 images spread over the set"
        ),
        "bytes": "files of the model folder, graphs with their external data",
    }
    return lines | _speed_lines(rows)


def _speed_lines(rows: Sequence[Row]) -> dict[str, str]:
    timed = [row for row in rows if row.speed]
    if not timed or timed[0].speed is None:
        return {"speed": "not measured"}
    speed = timed[0].speed
    order = " ".join(row.name for row in timed)
    noisy = [r.name for r in timed if r.speed and r.speed.spread > NOISY]
    tail = f"; spread over {100 * NOISY:.0f} % of the median: {', '.join(noisy)}" if noisy else ""
    reset = all(r.memory.peak_was_reset for r in timed if r.memory)
    return {
        "speed": (
            f"{speed.rounds} rounds in the order {order}, {speed.images} images each after one "
            f"warm-up caption, {speed.runs} runs per model; medians; time per token is "
            f"(total - first token) / (tokens - 1){tail}"
        ),
        "percentiles": "p90 by MLPerf early stopping (confidence 99 %), only from 64 runs or more",
        "memory": (
            "peak resident set (VmHWM) of the speed processes, which only caption; larger of loading "
            f"and running{'' if reset else '; the peak could not be reset between them'}"
        ),
    }
