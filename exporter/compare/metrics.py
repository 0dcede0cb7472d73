"""The figures of the comparison by name: what `medexport metrics` lists."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.compare.captions.profiles import PROFILES
from exporter.compare.captions.table import CAPTION_METRICS, BuiltIn


@dataclass(frozen=True)
class Metric:
    """One figure; `better` is "lower", "higher" or what it should be near to.

    `needs` is what is not built in, `seconds` the cost per 1,000 captions where it was measured alone
    (`captions.table.COST`).
    """

    name: str
    unit: str
    better: str
    what: str
    needs: str = ""
    seconds: float | None = None


METRICS = (
    Metric("bytes", "byte", "lower", "size on disk, by part"),
    Metric("first_token", "ms", "lower", "preparation, vision and prefill; median"),
    Metric("tokens_per_second", "1/s", "higher", "1 / median time per output token"),
    Metric("total", "ms", "lower", "whole caption; median, p90 from 64 runs"),
    Metric("peak", "byte", "lower", "peak resident memory of a process that only captions"),
    Metric("unique", "byte", "lower", "memory that the process shares with none (USS)"),
    Metric("facts_right", "0..1", "higher", "share of the ground truth's clinical facts stated"),
    Metric("facts_precision", "0..1", "higher", "share of the stated facts that are true"),
    Metric("flips", "images", "lower", "images with a fact turned over against the reference"),
    Metric("kl", "nat", "lower", "KL(reference || candidate) per token, on the reference's text"),
    Metric("top1_agreement", "0..1", "higher", "tokens with the same most likely next token"),
    Metric("perplexity_ratio", "1", "near 1", "perplexity of the reference's text, candidate/own"),
    Metric("first_divergent", "token", "higher", "median first different token of greedy captions"),
    Metric(
        "verdict", "", "PASS", "all gated quantities inside their margins; see docs/comparison.md"
    ),
    Metric("image_use", "0..1", "higher", "captions that differ from a blank image's"),
    Metric("distinct", "0..1", "higher", "captions that no other patient has"),
    Metric("repetition", "0..1", "lower", "captions that end in a loop"),
    Metric("length", "1", "near 1", "generated tokens against the reference's"),
)


def all_metrics() -> tuple[Metric, ...]:
    """The comparison's own figures, the caption metrics and the profiles that average them."""
    captions = [
        Metric(
            row.name,
            row.unit,
            "higher",
            f"{row.what}: {', '.join(row.figures)}",
            "" if isinstance(row, BuiltIn) else _needs(row.holds, row.extra),
            row.seconds,
        )
        for row in CAPTION_METRICS
    ]
    profiles = [
        Metric(
            p.name,
            "mean",
            "higher",
            f"{p.what}: relevance, factuality, overall",
            ", ".join(dict.fromkeys(part.metric for part in p.parts)),
        )
        for p in PROFILES
    ]
    return (*METRICS, *captions, *profiles)


def _needs(holds: str, extra: str) -> str:
    return f"{holds}; medexport[{extra}]" if extra else holds
