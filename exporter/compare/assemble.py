"""From what the processes answered to the figures of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from statistics import fmean

import numpy as np

from exporter.compare.jobs import CaseResult
from exporter.compare.quality.difference import (
    FLIPPED,
    KEPT,
    Change,
    FactCounts,
    add_counts,
    compare_facts,
    count_changes,
)
from exporter.compare.quality.distribution import TokenScores, summarize
from exporter.compare.quality.facts import KINDS, Extraction, extract_facts
from exporter.compare.quality.rouge import rouge1
from exporter.compare.records import (
    CaptionRow,
    CaseRow,
    ChangeRow,
    Distribution,
    Figure,
    Length,
    Moved,
    Slice,
    Truth,
)
from exporter.compare.statistics import Interval, bootstrap_ratio, clopper_pearson
from exporter.core.cases import Case


@dataclass(frozen=True)
class Judged:
    """One caption of one model with what was found in it."""

    case: Case
    said: CaseResult
    reference: CaseResult
    truth: tuple[Change, ...] | None
    moved: tuple[Change, ...]

    @cached_property
    def rouge1(self) -> float | None:
        """ROUGE-1 F against the ground truth; None without one."""
        return None if self.case.caption is None else rouge1(self.case.caption, self.said.text)

    @cached_property
    def truth_counts(self) -> FactCounts | None:
        """Facts against the ground truth; None without one."""
        return None if self.truth is None else count_changes(self.truth)

    @property
    def flips(self) -> int:
        """Facts flipped against the reference."""
        return sum(c.outcome == FLIPPED for c in self.moved)

    @property
    def kl(self) -> list[float]:
        """KL of each scored token."""
        return self.said.scores.kl if self.said.scores else []


class Judge:
    """Judges captions against ground truth and against the reference's captions."""

    def __init__(self, cases: Sequence[Case], reference: Sequence[CaseResult]) -> None:
        self._cases = cases
        self._reference = {r.id: r for r in reference}
        self._read: dict[str, Extraction] = {}

    def judge(self, results: Sequence[CaseResult]) -> list[Judged]:
        """One model's captions, in the order of the cases."""
        said = {r.id: r for r in results}
        return [self._judge(c, said[c.id], self._reference[c.id]) for c in self._cases]

    def _judge(self, case: Case, said: CaseResult, reference: CaseResult) -> Judged:
        own = self.facts(said.text)
        truth = None if case.caption is None else compare_facts(self.facts(case.caption), own)
        moved = compare_facts(self.facts(reference.text), own)
        return Judged(case, said, reference, truth, moved)

    def facts(self, text: str) -> Extraction:
        """The facts of a text, read once."""
        if text not in self._read:
            self._read[text] = extract_facts(text)
        return self._read[text]


def rouge1_figures(
    own: Sequence[Judged], reference: Sequence[Judged]
) -> tuple[Figure, Figure] | None:
    """Mean ROUGE-1 F and its paired difference from the reference; None without ground truth."""
    pairs = [(a.case, a.rouge1, b.rouge1) for a, b in zip(own, reference, strict=True)]
    known = [(case, a, b) for case, a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    cases, ones = [case for case, _, _ in known], [1.0] * len(known)
    value = _ratio([a for _, a, _ in known], ones, cases)
    return value, _ratio([a - b for _, a, b in known], ones, cases)


def truth_figures(
    own: Sequence[Judged], reference: Sequence[Judged]
) -> tuple[Truth, Figure] | None:
    """Facts against ground truth and the paired difference of the share that is right.

    None when no ground truth states a fact.
    """
    pairs = [(a.case, a.truth_counts, b.truth_counts) for a, b in zip(own, reference, strict=True)]
    known = [(case, a, b) for case, a, b in pairs if a is not None and b is not None]
    totals = [float(a.total) for _, a, _ in known]
    if not sum(totals):
        return None
    cases = [case for case, _, _ in known]
    right = sum(a.kept for _, a, _ in known)
    stated = sum(a.stated for _, a, _ in known)
    by_kind = dict.fromkeys(KINDS, (0, 0))
    for changes in (j.truth for j in own if j.truth):
        for kind in KINDS:
            part = count_changes(c for c in changes if c.kind == kind)
            by_kind[kind] = (by_kind[kind][0] + part.kept, by_kind[kind][1] + part.total)
    truth = Truth(
        right=right,
        total=int(sum(totals)),
        stated=stated,
        recall=_ratio([float(a.kept) for _, a, _ in known], totals, cases),
        precision=right / stated if stated else None,
        by_kind=by_kind,
        by_finding=_by_finding(own),
    )
    return truth, _ratio([float(a.kept - b.kept) for _, a, b in known], totals, cases)


def _by_finding(own: Sequence[Judged]) -> dict[str, tuple[int, int]]:
    """Of the facts that the ground truth states about each finding or device (present or absent, side,
    size, severity): how many are right, and how many there are; the most frequent first.
    """
    found: dict[str, tuple[int, int]] = {}
    for change in (c for j in own if j.truth for c in j.truth):
        if change.before is not None and change.before.subject:
            right, total = found.get(change.before.subject, (0, 0))
            found[change.before.subject] = (right + (change.outcome == KEPT), total + 1)
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def moved_figures(own: Sequence[Judged]) -> Moved:
    """What became of the reference's facts."""
    counts = add_counts(count_changes(j.moved) for j in own)
    flipped = [c for j in own for c in j.moved if c.outcome == FLIPPED]
    images = sum(j.flips > 0 for j in own)
    interval = clopper_pearson(images, len(own))
    return Moved(
        kept=counts.kept,
        lost=counts.lost,
        added=counts.added,
        flipped=counts.flipped,
        flips=_figure(interval, [j.case for j in own]),
        flipped_by_kind={k: n for k in KINDS if (n := sum(c.kind == k for c in flipped))},
    )


def distribution_figures(own: Sequence[Judged]) -> Distribution | None:
    """The distribution's figures over all scored tokens; None when nothing was scored."""
    scores = [
        TokenScores(
            np.array(s.kl),
            np.array(s.agree),
            np.array(s.reference_logprob),
            np.array(s.candidate_logprob),
        )
        for j in own
        if (s := j.said.scores) is not None
    ]
    found = summarize(scores, [(j.reference.tokens, j.said.tokens) for j in own])
    if found is None:
        return None
    values = dict(vars(found))
    values["kl_standard_error"] = _finite(found.kl_standard_error)
    return Distribution(**values)


def length_figures(own: Sequence[Judged]) -> Length:
    """Generated tokens beside the reference's."""
    tokens = sum(len(j.said.tokens) for j in own)
    reference = sum(len(j.reference.tokens) for j in own)
    ratio = tokens / reference if reference else 1.0
    unknown = any(j.said.stopped is None for j in own)
    cut = None if unknown else sum(not j.said.stopped for j in own)
    return Length(tokens, ratio, cut)


def slices(own: Sequence[Judged]) -> dict[str, Slice]:
    """Figures per modality, by name."""
    groups: dict[str, list[Judged]] = {}
    for judged in own:
        groups.setdefault(judged.case.modality, []).append(judged)
    return {name: _slice(groups[name]) for name in sorted(groups)}


def case_rows(
    judged: Mapping[str, Sequence[Judged]], judge: Judge, digests: Mapping[str, str] | None = None
) -> tuple[CaseRow, ...]:
    """One row per image with the captions of all models; `digests` are the images' by case id."""
    known, rows = digests or {}, []
    for column in zip(*judged.values(), strict=True):
        case = column[0].case
        rows.append(
            CaseRow(
                id=case.id,
                image=str(case.image),
                patient=case.patient,
                modality=case.modality,
                truth=case.caption,
                facts=None if case.caption is None else len(judge.facts(case.caption).facts),
                captions={n: _caption_row(j) for n, j in zip(judged, column, strict=True)},
                sha256=known.get(case.id, ""),
            )
        )
    return tuple(rows)


def _caption_row(judged: Judged) -> CaptionRow:
    counts, probe = judged.truth_counts, judged.said.probe
    return CaptionRow(
        text=judged.said.text,
        tokens=len(judged.said.tokens),
        identical=judged.said.tokens == judged.reference.tokens,
        kl_mean=fmean(judged.kl) if judged.kl else None,
        rouge1=judged.rouge1,
        right=None if counts is None else counts.kept,
        changes=tuple(
            ChangeRow(c.outcome, c.kind, c.text) for c in judged.moved if c.outcome != KEPT
        ),
        ids=tuple(judged.said.tokens),
        stopped=judged.said.stopped,
        blank=tuple(probe.blank) if probe else None,
        prompt=probe.prompt if probe else None,
        perturbed=judged.said.perturbed,
    )


def _slice(own: Sequence[Judged]) -> Slice:
    rouges = [j.rouge1 for j in own if j.rouge1 is not None]
    counts = [c for j in own if (c := j.truth_counts) is not None]
    kl = [v for j in own for v in j.kl]
    return Slice(
        images=len(own),
        patients=len({j.case.patient for j in own}),
        rouge1=fmean(rouges) if rouges else None,
        right=sum(c.kept for c in counts) if counts else None,
        total=sum(c.total for c in counts) if counts else None,
        flips=sum(j.flips for j in own),
        kl_mean=fmean(kl) if kl else None,
    )


def _ratio(top: Sequence[float], bottom: Sequence[float], cases: Sequence[Case]) -> Figure:
    return _figure(bootstrap_ratio(top, bottom, [c.patient for c in cases]), cases)


def _figure(interval: Interval, cases: Sequence[Case]) -> Figure:
    return Figure(
        value=interval.value,
        low=_finite(interval.low),
        high=_finite(interval.high),
        images=len(cases),
        patients=len({c.patient for c in cases}),
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity: an unknown bound is null."""
    return value if isfinite(value) else None
