"""Summaries beside the reference's and the ground truth's: ROUGE, clinical facts, distribution, length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from exporter.catalog.schema import TaskGate
from exporter.compare.decide import Sums, mean, paired_share, rate
from exporter.compare.quality.difference import (
    FLIPPED,
    KEPT,
    Change,
    compare_facts,
    count_changes,
)
from exporter.compare.quality.facts import extract_facts
from exporter.compare.quality.rouge import rouge1, rouge_l
from exporter.compare.records import Figure
from exporter.compare.tasks.jobs import TaskJobCase, TaskResult, Written
from exporter.compare.tasks.linear import Paired, figure, means, plain
from exporter.compare.tasks.measure import Draw, Measured, Subject, text_job_cases
from exporter.compare.tasks.records import TaskAnswer, Unit
from exporter.compare.verdict import Quantity
from exporter.core.errors import InputRefused
from exporter.core.text_cases import TextCase

NO_TRUTH = "no ground-truth summaries"
Changes = tuple[Change, ...]


class SummaryMeasure:
    """`Measure` of models that make a text shorter."""

    unit: Unit = "texts"
    labels: Sequence[str] = ()
    texts: Sequence[str] = ()
    draw: Draw | None = None

    def __init__(self, cases: Sequence[TextCase]) -> None:
        self._cases = cases
        self._patients = [c.patient for c in cases]
        self.subjects = [
            Subject(
                c.id, c.patient, c.kind, None, c.text, {"summary": c.summary} if c.summary else {}
            )
            for c in cases
        ]

    def job_cases(self) -> tuple[TaskJobCase, ...]:
        """The texts as they are."""
        return text_job_cases(self._cases)

    def read(self, result: TaskResult, folder: Path) -> list[Written]:
        """The summaries of a worker. Raises `InputRefused` when they are of other texts."""
        if len(result.written) != len(self._cases):
            raise InputRefused(f"{folder}: not a result for these texts; remove the work folder")
        return result.written

    def measure(self, own: Sequence[Written], base: Sequence[Written], gate: TaskGate) -> Measured:
        """All figures, differences and quantities of one model."""
        moved = [_changes(b.text, a.text) for a, b in zip(own, base, strict=True)]
        same = [rouge_l(b.text, a.text) for a, b in zip(own, base, strict=True)]
        figures = {
            "ROUGE-L with reference": figure(means(same, self._patients)),
            "identical": figure(
                means(
                    [float(a.tokens == b.tokens) for a, b in zip(own, base, strict=True)],
                    self._patients,
                )
            ),
            "tokens": figure(means([float(len(w.tokens)) for w in own], self._patients)),
            "cut": plain(float(sum(not w.stopped for w in own)), self._patients),
        }
        for outcome in (KEPT, "lost", "added", FLIPPED):
            count = sum(c.outcome == outcome for changes in moved for c in changes)
            figures[f"facts {outcome}"] = plain(float(count), self._patients)
        flipped = [any(c.outcome == FLIPPED for c in changes) for changes in moved]
        quantities: dict[str, Quantity | str] = {
            "distribution": self._distribution(own, figures, gate),
            "truncation": self._truncation(own, base, gate),
            "length": self._length(own, base, gate),
            "flips": rate(
                "flips", flipped, self._patients, gate.flip_rate,
                f"a fact is turned over in {sum(flipped)} of {len(flipped)} summaries",
            ),
        }  # fmt: skip
        differences: dict[str, Figure] = {}
        for pair in self._against_truth(own, base, gate):
            figures[pair.name], differences[pair.name] = pair.figure, pair.difference
            quantities[pair.name] = pair.quantity()
        if not differences:
            quantities["ROUGE-1"] = NO_TRUTH
        return Measured(figures, differences, quantities, _answers(own, base, moved, same))

    def method(self) -> dict[str, str]:
        """How each figure was measured."""
        return {
            "summaries": "greedy; same texts, same words before them, same length limit for all",
            "distribution": (
                "teacher-forced: each model reads the text and the reference's own summary; "
                "KL(reference || candidate) in nats in float64"
            ),
            "ROUGE": "F-measure, lowercase, no stemmer, mean over texts with a ground-truth summary",
            "facts": (
                "rule-based extraction from the summaries; kept, lost, added and flipped against the "
                "reference's own; right: stated by ground truth and model alike"
            ),
        }

    def _distribution(
        self, own: Sequence[Written], figures: dict[str, Figure], gate: TaskGate
    ) -> Quantity | str:
        scored = [
            (w.scores, p) for w, p in zip(own, self._patients, strict=True) if w.scores is not None
        ]
        if not scored:
            return "no logits were compared"
        patients = [p for _, p in scored]
        tokens = [float(len(s.kl)) for s, _ in scored]
        sums = Sums([sum(s.kl) for s, _ in scored], tokens, patients)
        figures["KL"] = figure(sums)
        agreed = Sums([float(sum(s.agree)) for s, _ in scored], tokens, patients)
        figures["top-1"] = figure(agreed)
        value = sum(sums.tops) / sum(tokens)
        said = f"the mean KL is {value:.3g} nats on {int(sum(tokens))} tokens"
        return mean("distribution", sums, (None, gate.kl_mean), said)

    def _length(
        self, own: Sequence[Written], base: Sequence[Written], gate: TaskGate
    ) -> Quantity | str:
        now, before = ([float(len(w.tokens)) for w in side] for side in (own, base))
        if not sum(before):
            return "the reference's summaries are empty"
        said = f"{sum(now):.0f} tokens against {sum(before):.0f}"
        sums = Sums([a - b for a, b in zip(now, before, strict=True)], before, self._patients)
        margin = (gate.length_low, gate.length_high)
        return mean("length", sums, margin, said, unit=1.0, shift=1.0, share=True)

    def _truncation(
        self, own: Sequence[Written], base: Sequence[Written], gate: TaskGate
    ) -> Quantity:
        now, before = ([not w.stopped for w in side] for side in (own, base))
        said = f"{sum(now)} of {len(now)} cut before their end, {sum(before)} of the reference's"
        margin = (None, gate.truncation_rise)
        return paired_share("truncation", now, before, self._patients, margin, said)

    def _against_truth(
        self, own: Sequence[Written], base: Sequence[Written], gate: TaskGate
    ) -> list[Paired]:
        rows = [
            (c.summary, a.text, b.text, c.patient)
            for c, a, b in zip(self._cases, own, base, strict=True)
            if c.summary
        ]
        if not rows:
            return []
        patients = [p for *_, p in rows]
        found = []
        counts = [[count_changes(_changes(row[0], row[side])) for row in rows] for side in (1, 2)]
        totals = [float(c.total) for c in counts[0]]
        if sum(totals):
            right = [Sums([float(c.kept) for c in side], totals, patients) for side in counts]
            margin = (-gate.facts_right_loss, None)
            found.append(Paired("facts right", right[0], right[1], margin, unit=1.0))
        for name, rouge in (("ROUGE-1", rouge1), ("ROUGE-L", rouge_l)):
            sides = [means([rouge(row[0], row[i]) for row in rows], patients) for i in (1, 2)]
            found.append(Paired(name, sides[0], sides[1], (-gate.rouge1_loss, None)))
        return found


def _changes(truth: str, said: str) -> Changes:
    return compare_facts(extract_facts(truth), extract_facts(said))


def _answers(
    own: Sequence[Written],
    base: Sequence[Written],
    moved: Sequence[Changes],
    same: Sequence[float],
) -> list[TaskAnswer]:
    answers = []
    for said, before, changes, alike in zip(own, base, moved, same, strict=True):
        ordered = sorted(changes, key=lambda c: c.outcome != FLIPPED)
        words = tuple(f"{c.outcome}: {c.text}" for c in ordered if c.outcome != KEPT)
        if not words and said.tokens != before.tokens:
            words = ("other words",)
        values = {"ROUGE-L": alike}
        if said.scores is not None and said.scores.kl:
            values["KL"] = fmean(said.scores.kl)
        answers.append(TaskAnswer(said.text, words, values.get("KL", 1 - alike), values))
    return answers
