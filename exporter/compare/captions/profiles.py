"""The caption task's two averages: as its description defines them and as its evaluator computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.compare.captions.base import NotComputed, Pair, Tally, mean_tally
from exporter.compare.captions.prepare import imageclef_pairs
from exporter.compare.captions.run import OpenMetrics
from exporter.core.errors import WrongUsage


@dataclass(frozen=True)
class Part:
    """One figure of a metric; `prepared`: on lowercase texts without digits and punctuation."""

    metric: str
    figure: str
    prepared: bool = False


@dataclass(frozen=True)
class Profile:
    """Relevance and factuality are the means of their parts, overall is the mean of the two."""

    name: str
    what: str
    relevance: tuple[Part, ...]
    factuality: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return (*self.relevance, *self.factuality)


PROFILES = (
    Profile(
        "imageclef-spec",
        "ImageCLEFmedical caption as described: cosine, BERTScore recall with idf, ROUGE-1, BLEURT-20; "
        "concepts of the MEDCON groups, AlignScore",
        (
            Part("similarity", "similarity_cosine"),
            Part("bertscore", "bertscore_recall", prepared=True),
            Part("rouge", "rouge1", prepared=True),
            Part("bleurt", "bleurt", prepared=True),
        ),
        (Part("concepts", "concepts_medcon"), Part("alignscore", "alignscore")),
    ),
    Profile(
        "imageclef-2026-code",
        "as the evaluator published in 2026 computes it: 2.5 max(cosine, 0), BERTScore F1, BLEURT-20-D12, "
        "concepts of all types",
        (
            Part("similarity", "similarity_scaled"),
            Part("bertscore", "bertscore_f1", prepared=True),
            Part("rouge", "rouge1", prepared=True),
            Part("bleurt", "bleurt", prepared=True),
        ),
        (Part("concepts", "concepts_all"), Part("alignscore", "alignscore")),
    ),
)


def profile_named(name: str) -> Profile:
    """The profile called `name`. Raises `WrongUsage`."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise WrongUsage(f"no profile '{name}'; expected {' or '.join(p.name for p in PROFILES)}")


def score_profile(
    profile: Profile, metrics: OpenMetrics, pairs: Sequence[Pair]
) -> tuple[dict[str, Tally], dict[str, str]]:
    """The parts that could be computed, the averages whose parts all were, and why others were not.

    Figures are named "<profile>.<part>", such as imageclef-spec.overall.
    """
    found: dict[str, Tally] = {}
    lost: dict[str, str] = {}
    for prepared in (False, True):
        parts = [p for p in profile.parts if p.prepared == prepared]
        texts = imageclef_pairs(pairs) if prepared else pairs
        for part in parts:
            scored = _scored(metrics, part, texts)
            if isinstance(scored, NotComputed):
                lost[part.figure] = scored.reason
            else:
                found[part.figure] = scored[part.figure]
    named = {part.figure: found[part.figure] for part in profile.parts if part.figure in found}
    groups = [[part.figure for part in side] for side in (profile.relevance, profile.factuality)]
    wanted = {"relevance": groups[:1], "factuality": groups[1:], "overall": groups}
    averages = {name: _average(named, lost, sides) for name, sides in wanted.items()}
    for name, average in averages.items():
        if isinstance(average, Tally):
            named[name] = average
        else:
            lost[name] = average.reason
    return (
        {f"{profile.name}.{name}": tally for name, tally in named.items()},
        {f"{profile.name}.{name}": why for name, why in lost.items()},
    )


def _scored(
    metrics: OpenMetrics, part: Part, pairs: Sequence[Pair]
) -> Mapping[str, Tally] | NotComputed:
    if part.metric not in metrics.ready:
        return NotComputed(metrics.not_computed[part.metric])
    return metrics.ready[part.metric].score(pairs)


def _average(
    found: Mapping[str, Tally], lost: Mapping[str, str], groups: Sequence[Sequence[str]]
) -> Tally | NotComputed:
    """The mean over `groups` of the mean of their parts, or which parts are missing and where each was
    looked for.
    """
    missing = [part for group in groups for part in group if part not in found]
    if missing:
        where = "; ".join(f"{part} ({lost[part].partition(';')[0]})" for part in missing)
        return NotComputed(f"lacks {where}")
    # All parts are means of one score per pair, so their average is one too.
    sides = [np.mean([found[part].counts[:, 0] for part in group], axis=0) for group in groups]
    return mean_tally(np.mean(sides, axis=0))
