"""Caption metrics of several models on the same images, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from exporter.compare.assemble import Judged
from exporter.compare.captions.base import Pair, Tally
from exporter.compare.captions.profiles import Profile, profile_named, score_profile
from exporter.compare.captions.resample import differences, intervals
from exporter.compare.captions.run import MetricPaths, OpenMetrics, chosen_names, open_metrics
from exporter.compare.records import Figure
from exporter.compare.statistics import Interval


@dataclass(frozen=True)
class MetricsAsked:
    """Which caption metrics: names of the table ("all"; none: the built-in ones) and profiles."""

    names: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    paths: MetricPaths = field(default_factory=MetricPaths)


@dataclass(frozen=True)
class CaptionFigures:
    """Figures of one model by name, less the reference's, and why a metric has none."""

    figures: dict[str, Figure]
    differences: dict[str, Figure]
    not_computed: dict[str, str]


def caption_figures(
    said: Mapping[str, Sequence[Pair]], patients: Sequence[str], asked: MetricsAsked
) -> tuple[dict[str, CaptionFigures], dict[str, str]]:
    """The figures of each model of `said`, and the settings of each metric by its name.

    All models have the same pairs in the same order, at least one; the first model is the reference.
    Raises `WrongUsage` for an unknown metric or profile, `InputRefused` for unusable weights.
    """
    profiles = [profile_named(name) for name in asked.profiles]
    names = set(chosen_names(asked.names)) if asked.names or not profiles else set()
    parts = {part.metric for profile in profiles for part in profile.parts}
    metrics = open_metrics(chosen_names(sorted(names | parts)), asked.paths)
    shown = OpenMetrics(
        {n: m for n, m in metrics.ready.items() if n in names},
        {n: why for n, why in metrics.not_computed.items() if n in names},
    )
    found: dict[str, CaptionFigures] = {}
    base: dict[str, Tally] | None = None
    for model, pairs in said.items():
        own, lost = _tallies(shown, metrics, profiles, pairs)
        less = {} if base is None else differences(own, base, patients)
        found[model] = CaptionFigures(
            _figures(intervals(own, patients), patients), _figures(less, patients), lost
        )
        base = own if base is None else base
    return found, metrics.how


def judged_figures(
    judged: Mapping[str, Sequence[Judged]], asked: MetricsAsked
) -> tuple[dict[str, CaptionFigures], dict[str, str]]:
    """`caption_figures` of a comparison: of the images with a ground-truth caption, if there are any."""
    said = {
        model: [
            Pair(j.case.id, j.case.caption, j.said.text, j.case.image)
            for j in column
            if j.case.caption is not None
        ]
        for model, column in judged.items()
    }
    known = [j.case.patient for j in next(iter(judged.values())) if j.case.caption is not None]
    if known:
        return caption_figures(said, known, asked)
    return {model: CaptionFigures({}, {}, {}) for model in judged}, {}


def _tallies(
    shown: OpenMetrics, metrics: OpenMetrics, profiles: Sequence[Profile], pairs: Sequence[Pair]
) -> tuple[dict[str, Tally], dict[str, str]]:
    own, lost = shown.score(pairs)
    for profile in profiles:
        more, without = score_profile(profile, metrics, pairs)
        own |= more
        lost |= without
    return own, lost


def _figures(found: Mapping[str, Interval], patients: Sequence[str]) -> dict[str, Figure]:
    return {
        name: Figure(
            interval.value,
            interval.low if isfinite(interval.low) else None,
            interval.high if isfinite(interval.high) else None,
            len(patients),
            len(set(patients)),
        )
        for name, interval in found.items()
    }
