"""Entities that two models find in the same texts, against each other and against ground truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.catalog.schema import TaskGate
from exporter.compare.decide import mean
from exporter.compare.quality.trust import EntityScore
from exporter.compare.records import Figure
from exporter.compare.tasks.linear import Paired, figure, means, ratio_values
from exporter.compare.tasks.measure import Measured
from exporter.compare.tasks.records import LabelRow, TaskAnswer
from exporter.compare.verdict import Quantity
from exporter.core.text_cases import TextCase

# (type, start, end) in characters.
Spans = frozenset[tuple[str, int, int]]


def span_score(truth: Sequence[Spans], said: Sequence[Spans]) -> EntityScore:
    """Entities that agree in type, begin and end, over all texts."""
    pairs = list(zip(truth, said, strict=True))
    return EntityScore(sum(len(t & s) for t, s in pairs), sum(map(len, said)), sum(map(len, truth)))


def f1_values(truth: Sequence[Spans], said: Sequence[Spans]) -> list[float]:
    """Pseudo-values of the micro F1, one per text. Raises ValueError without any entity."""
    pairs = list(zip(truth, said, strict=True))
    tops = [2.0 * len(t & s) for t, s in pairs]
    values: list[float] = ratio_values(tops, [float(len(t) + len(s)) for t, s in pairs]).tolist()
    return values


def entity_figures(
    cases: Sequence[TextCase],
    own: Sequence[Spans],
    base: Sequence[Spans],
    labels: Sequence[str],
    gate: TaskGate,
) -> Measured:
    """Figures of a token head; ground truth counts where it has types that the head knows."""
    patients = [c.patient for c in cases]
    figures: dict[str, Figure] = {}
    differences: dict[str, Figure] = {}
    quantities: dict[str, Quantity | str] = {}
    if any(own) or any(base):
        values = np.array(f1_values(base, own))
        score = span_score(base, own)
        figures["entity F1 with reference"] = figure(means(values, patients))
        quantities["entities"] = mean(
            "entities", means(1 - values, patients), (None, gate.entity_shift),
            f"{score.right} of the reference's {score.truth} entities, {score.predicted} found",
        )  # fmt: skip
    else:
        quantities["entities"] = "neither model finds an entity"
    known = {label.partition("-")[2] or label for label in labels}
    have = [i for i, c in enumerate(cases) if c.entities is not None]
    truth = [_spans(cases[i], known) for i in have]
    rows: dict[str, LabelRow] = {}
    if any(truth):
        sides = [[side[i] for i in have] for side in (own, base)]
        whose = [patients[i] for i in have]
        for name, pick in (("entity F1", None), *((t, t) for t in sorted(known))):
            pair = _paired(name, truth, sides, whose, pick)
            if pair is None:
                continue
            if pick is None:
                pair = Paired(pair.name, pair.own, pair.base, (-gate.entity_f1_loss, None))
                figures[name], differences[name] = pair.figure, pair.difference
                quantities[name] = pair.quantity()
            else:
                count = sum(len(_of(t, pick)) for t in truth)
                rows[name] = LabelRow(count, None, {"F1": pair.figure}, {"F1": pair.difference})
    else:
        quantities["entity F1"] = "no ground-truth entities of the head's types"
    answers = [_answer(c, a, b) for c, a, b in zip(cases, own, base, strict=True)]
    return Measured(figures, differences, quantities, answers, rows)


def _paired(
    name: str,
    truth: Sequence[Spans],
    sides: Sequence[Sequence[Spans]],
    patients: Sequence[str],
    pick: str | None,
) -> Paired | None:
    """F1 of both models, over all types or one; None where there is nothing to find or found."""
    expected = [_of(t, pick) for t in truth]
    said = [[_of(s, pick) for s in side] for side in sides]
    if not any(expected):
        return None
    own, base = (means(f1_values(expected, side), patients) for side in said)
    return Paired(name, own, base)


def _of(spans: Spans, kind: str | None) -> Spans:
    return spans if kind is None else frozenset(s for s in spans if s[0] == kind)


def _spans(case: TextCase, known: set[str]) -> Spans:
    return frozenset((e.type, e.start, e.end) for e in case.entities or () if e.type in known)


def _answer(case: TextCase, own: Spans, base: Spans) -> TaskAnswer:
    def named(spans: Spans) -> list[str]:
        ordered = sorted(spans, key=lambda s: s[1:])
        return [f"{kind} '{case.text[start:end]}'" for kind, start, end in ordered]

    changes = [f"lost: {x}" for x in named(base - own)] + [f"added: {x}" for x in named(own - base)]
    whole = len(own) + len(base)
    distance = 1 - 2 * len(own & base) / whole if whole else 0.0
    return TaskAnswer(", ".join(named(own)), tuple(changes), distance)
