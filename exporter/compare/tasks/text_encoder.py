"""Text encoders beside the reference: vectors and their neighbours, labels, or entities by the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import TaskGate
from exporter.compare.decide import Sums, mean, rate
from exporter.compare.records import Figure
from exporter.compare.tasks.entities import Spans, entity_figures
from exporter.compare.tasks.jobs import TaskJobCase, TaskResult, read_array
from exporter.compare.tasks.linear import Paired, auroc_values, figure, less, means, plain
from exporter.compare.tasks.measure import Draw, Measured, Subject, text_job_cases
from exporter.compare.tasks.records import LabelRow, TaskAnswer, Unit
from exporter.compare.verdict import Quantity
from exporter.compare.wording import percent
from exporter.core.errors import InputRefused
from exporter.core.text_cases import TextCase
from exporter.runtimes.tasks.zero_shot import unit_rows

NEIGHBOURS = 5
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Encoded:
    """What one model gives: unit vectors, probabilities of labels, or entities, by its head."""

    head: str
    rows: Float64
    labels: tuple[str, ...]
    entities: list[Spans]


class TextEncoderMeasure:
    """`Measure` of text encoders."""

    unit: Unit = "texts"
    labels: Sequence[str] = ()
    texts: Sequence[str] = ()
    draw: Draw | None = None

    def __init__(self, cases: Sequence[TextCase]) -> None:
        self._cases = cases
        self._patients = [c.patient for c in cases]
        self.subjects = [
            Subject(c.id, c.patient, c.kind, None, c.text, {"label": c.label} if c.label else {})
            for c in cases
        ]

    def job_cases(self) -> tuple[TaskJobCase, ...]:
        """The texts as they are."""
        return text_job_cases(self._cases)

    def read(self, result: TaskResult, folder: Path) -> Encoded:
        """What a worker left. Raises `InputRefused`."""
        head, rows = result.head or "none", np.zeros((0, 0))
        if head != "token":
            found = np.asarray(read_array(folder, "rows"), dtype=np.float32)
            known = head == "class"
            rows = (
                _softmax(found.astype(float)) if known else unit_rows(found, "text").astype(float)
            )
        spans = [frozenset(entities) for entities in result.entities]
        return Encoded(head, rows, tuple(result.head_labels), spans)

    def measure(self, own: Encoded, base: Encoded, gate: TaskGate) -> Measured:
        """All figures, differences and quantities of one model, by what its head gives."""
        if (own.head, own.labels, own.rows.shape) != (base.head, base.labels, base.rows.shape):
            raise InputRefused(
                f"a head '{own.head}' with labels {list(own.labels)} against the reference's "
                f"'{base.head}' with {list(base.labels)}; expected a model of the same kind"
            )
        if own.head == "token":
            return entity_figures(self._cases, own.entities, base.entities, own.labels, gate)
        if own.head == "class":
            return self._classes(own, base, gate)
        return self._vectors(own, base, gate)

    def method(self) -> dict[str, str]:
        """How each figure was measured."""
        return {
            "vectors": (
                "mean of the last hidden states of a text's own tokens; cosine with the reference's; "
                f"neighbours: share of the reference's {NEIGHBOURS} nearest texts of the set that are "
                f"among the {NEIGHBOURS} nearest"
            ),
            "labels": "the most likely label of a classification head; AUROC of each label by softmax",
            "entities": (
                "a word has its first piece's tag; an entity is right when type, begin and end are "
                "(micro F1); tags are joined as seqeval's default mode does"
            ),
        }

    def _vectors(self, own: Encoded, base: Encoded, gate: TaskGate) -> Measured:
        shift = ((own.rows - base.rows) ** 2).sum(1) / 2
        worst = int(shift.argmax())
        figures = {
            "cosine": figure(means(1 - shift, self._patients)),
            "worst cosine": plain(float(1 - shift.max()), self._patients),
        }
        quantities: dict[str, Quantity | str] = {
            "vectors": mean(
                "vectors", means(shift, self._patients), (None, gate.embedding_shift),
                f"the mean of 1 - cosine with the reference's is {shift.mean():.2g}, at worst "
                f"{shift[worst]:.2g} ({self._cases[worst].id})",
            )
        }  # fmt: skip
        if len(self._cases) <= NEIGHBOURS + 1:
            quantities["neighbours"] = f"{len(self._cases)} texts; expected over {NEIGHBOURS + 1}"
            kept = [1.0] * len(self._cases)
        else:
            kept = neighbours_kept(own.rows, base.rows, NEIGHBOURS).tolist()
            figures[f"neighbours recall@{NEIGHBOURS}"] = figure(means(kept, self._patients))
            lost = [1 - k for k in kept]
            quantities["neighbours"] = mean(
                "neighbours", means(lost, self._patients), (None, gate.neighbour_loss),
                f"{percent(float(np.mean(lost)))} of the reference's {NEIGHBOURS} nearest texts are "
                f"no longer among the nearest",
                unit=1 / NEIGHBOURS, share=True,
            )  # fmt: skip
        answers = [
            TaskAnswer(
                f"{percent(k, 0)} of the neighbours",
                (f"{NEIGHBOURS - round(k * NEIGHBOURS)} of {NEIGHBOURS} neighbours are others",)
                if k < 1
                else (),
                float(s),
                {"cosine": float(1 - s)},
            )
            for s, k in zip(shift, kept, strict=True)
        ]
        return Measured(figures, {}, quantities, answers)

    def _classes(self, own: Encoded, base: Encoded, gate: TaskGate) -> Measured:
        now, before = own.rows.argmax(1), base.rows.argmax(1)
        changed = (now != before).tolist()
        quantities: dict[str, Quantity | str] = {
            "labels": rate(
                "labels", changed, self._patients, gate.label_change,
                f"another label is the most likely of {sum(changed)} of {len(changed)} texts",
            )
        }  # fmt: skip
        agreement = means([float(not c) for c in changed], self._patients)
        figures: dict[str, Figure] = {"label agreement": figure(agreement)}
        differences: dict[str, Figure] = {}
        rows: dict[str, LabelRow] = {}
        known = np.array([c.label in own.labels for c in self._cases])
        areas: list[tuple[Sums, Sums]] = []
        for i, label in enumerate(own.labels):
            positive = np.array([c.label == label for c in self._cases])
            hits = int((positive & known).sum())
            if 0 < hits < int(known.sum()):
                a, b = (
                    means(auroc_values(side.rows[:, i], positive, known), self._patients)
                    for side in (own, base)
                )
                areas.append((a, b))
                rows[label] = LabelRow(
                    hits, int(known.sum()) - hits,
                    {"auroc": figure(a)}, {"auroc": figure(less(a, b))},
                )  # fmt: skip
        for pair in self._known_figures(own, base, known, areas, gate):
            figures[pair.name], differences[pair.name] = pair.figure, pair.difference
            if pair.margin is not None:
                quantities[pair.name] = pair.quantity()
        if not areas:
            quantities["auroc"] = "no ground-truth label of this head on some of the texts only"
        answers = [
            TaskAnswer(
                f"{own.labels[a]} {percent(own.rows[i, a])}",
                (f"{own.labels[b]} -> {own.labels[a]}",) if a != b else (),
                float(np.abs(own.rows[i] - base.rows[i]).sum() / 2),
            )
            for i, (a, b) in enumerate(zip(now.tolist(), before.tolist(), strict=True))
        ]
        return Measured(figures, differences, quantities, answers, rows)

    def _known_figures(
        self,
        own: Encoded,
        base: Encoded,
        known: NDArray[np.bool_],
        areas: list[tuple[Sums, Sums]],
        gate: TaskGate,
    ) -> list[Paired]:
        found = []
        if areas:
            macro = [means(np.mean([pair[i].tops for pair in areas], 0), self._patients)
                     for i in (0, 1)]  # fmt: skip
            found.append(Paired("auroc", macro[0], macro[1], (-gate.auroc_loss, None)))
        if known.any():
            used = known.astype(float).tolist()
            right = [
                [float(side.labels[j] == c.label) for j, c in
                 zip(side.rows.argmax(1), self._cases, strict=True)]
                for side in (own, base)
            ]  # fmt: skip
            sums = [Sums(side, used, self._patients) for side in right]
            found.append(Paired("accuracy", sums[0], sums[1]))
        return found


def neighbours_kept(own: Float64, base: Float64, k: int) -> Float64:
    """Per text, the share of its `k` nearest in `base` that are among its `k` nearest in `own`.

    Both are unit vectors ``[texts, size]``; of equally near texts the first in the set counts.
    """
    near = [_nearest(rows, k) for rows in (own, base)]
    shares = [len(set(a) & set(b)) / k for a, b in zip(*(n.tolist() for n in near), strict=True)]
    return np.array(shares)


def _nearest(rows: Float64, k: int) -> NDArray[np.int64]:
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    # Rounding must not order texts that are equally near (equal texts).
    order: NDArray[np.int64] = np.argsort(-similarity.round(12), axis=1, kind="stable")[:, :k]
    return order


def _softmax(rows: Float64) -> Float64:
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    found: Float64 = weights / weights.sum(axis=1, keepdims=True)
    return found
