"""Zero-shot classification and retrieval beside the reference: AUROC, labels, recall at k, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import TaskGate
from exporter.compare.decide import Sums, mean, rate
from exporter.compare.records import Figure
from exporter.compare.tasks.jobs import TaskJobCase, TaskResult, read_array
from exporter.compare.tasks.labels import FINDINGS_METHOD, Labels, ground_truth
from exporter.compare.tasks.linear import (
    Paired,
    auroc_values,
    calibration_values,
    figure,
    less,
    means,
    plain,
)
from exporter.compare.tasks.measure import Annotation, Draw, Measured, Subject
from exporter.compare.tasks.records import LabelRow, TaskAnswer, Unit
from exporter.compare.verdict import Quantity
from exporter.compare.wording import percent, small
from exporter.core.cases import Case
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.runtimes.tasks.zero_shot import label_scores, retrieval_ranks

TOP = (1, 5, 10)
GATED_TOP = 5
NO_MODALITIES = "fewer than two modalities with enough images"
NO_FINDINGS = "no finding on enough images with and without it"
NO_LABELS = f"{NO_MODALITIES}, and {NO_FINDINGS}"
NO_CAPTIONS = f"fewer than {GATED_TOP + 1} different captions"
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Embedded:
    """What one model gives: unit vectors of images, label texts and captions; `bias` as in
    `runtimes.tasks.zero_shot.label_scores`.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.float32]
    captions: NDArray[np.float32]
    scale: float
    bias: float | None = None


@dataclass(frozen=True)
class Decided:
    """Probabilities ``[images, labels]`` and what they decide, from one model's vectors."""

    modality: Float64
    findings: Float64

    def decisions(self) -> list[NDArray[np.int64]]:
        """The choice per image: first among the modalities, then yes or no of each finding."""
        first = [self.modality.argmax(1)] if self.modality.shape[1] else []
        return first + [(column > 0.5).astype(np.int64) for column in self.findings.T]


class ZeroShotMeasure:
    """`Measure` of models that put images and texts into one space."""

    unit: Unit = "images"
    draw: Draw | None = None

    def __init__(self, cases: Sequence[Case], annotations: Mapping[str, Annotation]) -> None:
        self._cases = cases
        self._truth: Labels = ground_truth(cases, annotations)
        self._patients = [c.patient for c in cases]
        self.labels = self._truth.prompts
        self.texts = tuple(dict.fromkeys(c.caption for c in cases if c.caption))
        self.subjects = [
            Subject(
                c.id, c.patient, c.modality, c.image, None,
                {"caption": c.caption} if c.caption else {},
            )
            for c in cases
        ]  # fmt: skip

    def job_cases(self) -> tuple[TaskJobCase, ...]:
        """Images alone: labels and captions are asked once for all."""
        return tuple(
            TaskJobCase(c.id, sha256_file(c.image), image=str(c.image.resolve()))
            for c in self._cases
        )

    def read(self, result: TaskResult, folder: Path) -> Embedded:
        """The vectors that a worker left. Raises `InputRefused`."""
        images, labels, texts = (
            np.asarray(read_array(folder, name), dtype=np.float32)
            for name in ("images", "labels", "texts")
        )
        return Embedded(images, labels, texts, result.scale or 1.0, result.bias)

    def measure(self, own: Embedded, base: Embedded, gate: TaskGate) -> Measured:
        """All figures, differences and quantities of one model."""
        shift = _shift(own.images, base.images)
        decided, before = self._decide(own), self._decide(base)
        names = [c.id for c in self._cases]
        quantities: dict[str, Quantity | str] = {
            "image vectors": _shift_quantity("image vectors", shift, self._patients, names, gate),
        }
        figures = {
            "cosine": figure(means(1 - shift, self._patients)),
            "worst cosine": plain(float(1 - shift.max()), self._patients),
        }
        if len(_texts(own)):
            moved = _shift(_texts(own), _texts(base))
            texts = [*self.labels, *self.texts]
            figures["text cosine"] = figure(means(1 - moved, texts))
            figures["worst text cosine"] = plain(float(1 - moved.max()), texts)
            quantities["text vectors"] = _shift_quantity("text vectors", moved, texts, texts, gate)
        quantities["labels"] = self._modality_quantity(decided, before, gate)
        quantities["findings"] = self._finding_quantity(decided, before, gate)
        differences: dict[str, Figure] = {}
        for pair in (
            *self._class_figures(decided, before, gate),
            *self._retrieval_figures(own, base, gate),
        ):
            figures[pair.name], differences[pair.name] = pair.figure, pair.difference
            if pair.margin is not None:
                quantities[pair.name] = pair.quantity()
        if "auroc" not in figures:
            quantities["auroc"] = NO_LABELS
        if not any(n.startswith("retrieval") for n in quantities):
            quantities["retrieval"] = NO_CAPTIONS
        return Measured(
            figures, differences, quantities, self._answers(decided, before, shift),
            self._label_rows(decided, before),
        )  # fmt: skip

    def method(self) -> dict[str, str]:
        """How each figure was measured."""
        return {
            "cosine": "between each model's vector and the reference's for the same image or text",
            "labels": (
                "modalities: softmax over all of the set, or, where the model has a bias of the score "
                "(SigLIP, Zhai et al. 2023), the sigmoid of each by itself, of which the largest "
                "counts; a finding: softmax over it and its denial ('no ...'), as CheXzero does (Tiu "
                "et al. 2022), in which that bias would cancel: the likelier of both statements. "
                f"{FINDINGS_METHOD}"
            ),
            "auroc": (
                "area under the ROC curve of each label against the rest, ties half, and its mean "
                "over labels; intervals by the structural components of DeLong et al. 1988, summed "
                "over a patient's images (Obuchowski 1997)"
            ),
            "recall@k": (
                "share of images whose own caption is among the k nearest, and of captions whose own "
                "image is; images with the same caption count as its own; ties count against"
            ),
            "ece": "expected calibration error, 15 bins of equal width (Guo et al. 2017)",
        }

    def _decide(self, said: Embedded) -> Decided:
        count = len(self._truth.modalities)
        none = np.zeros((len(said.images), 0))
        modality = none
        if count:
            modality = label_scores(said.images, said.labels[:count], said.scale, said.bias)
        rest = said.labels[count:]
        # A statement and its denial share one probability, bias or none.
        pairs = [
            label_scores(said.images, rest[2 * i : 2 * i + 2], said.scale)[:, 0]
            for i in range(len(rest) // 2)
        ]
        return Decided(modality, np.stack(pairs, 1) if pairs else none)

    def _modality_quantity(self, own: Decided, base: Decided, gate: TaskGate) -> Quantity | str:
        if not self._truth.modalities:
            return NO_MODALITIES
        changed = own.modality.argmax(1) != base.modality.argmax(1)
        said = (
            f"another modality is the most likely on {int(changed.sum())} of {len(changed)} images"
        )
        return rate("labels", changed.tolist(), self._patients, gate.label_change, said)

    def _finding_quantity(self, own: Decided, base: Decided, gate: TaskGate) -> Quantity | str:
        """Present for absent, or the other way round, on any finding of an image."""
        if not self._truth.findings:
            return NO_FINDINGS
        turned = (own.findings > 0.5) != (base.findings > 0.5)
        changed = turned.any(axis=1)
        most = int(turned.sum(axis=0).argmax())
        said = f"a finding is turned over on {int(changed.sum())} of {len(changed)} images"
        if changed.any():
            said += f", most often {self._truth.findings[most]} ({int(turned[:, most].sum())})"
        return rate("findings", changed.tolist(), self._patients, gate.flip_rate, said)

    def _scored(
        self, decided: Decided
    ) -> dict[str, tuple[Float64, NDArray[np.bool_], NDArray[np.bool_]]]:
        """Score, truth and whether it is known, per image, of each label."""
        return {
            name: (column, self._truth.positive[name], self._truth.known[name])
            for name, column in zip(
                (*self._truth.modalities, *self._truth.findings),
                (*decided.modality.T, *decided.findings.T),
                strict=True,
            )
        }

    def _class_figures(self, own: Decided, base: Decided, gate: TaskGate) -> list[Paired]:
        if not self._scored(own):
            return []
        areas = [
            means(np.mean([auroc_values(*v) for v in self._scored(d).values()], 0), self._patients)
            for d in (own, base)
        ]
        errors = [self._calibration(d) for d in (own, base)]
        found = [
            Paired("auroc", areas[0], areas[1], (-gate.auroc_loss, None)),
            Paired("ece", errors[0], errors[1], (None, gate.calibration_rise)),
        ]
        if self._truth.modalities:
            right = [self._right(d) for d in (own, base)]
            found.append(Paired("accuracy", right[0], right[1]))
        return found

    def _right(self, decided: Decided) -> Sums:
        names = self._truth.modalities
        hit = [names[i] == c.modality for i, c in
               zip(decided.modality.argmax(1), self._cases, strict=True)]  # fmt: skip
        used = [float(c.modality in names) for c in self._cases]
        return Sums([float(h) for h in hit], used, self._patients)

    def _calibration(self, decided: Decided) -> Sums:
        """Every decision with a known truth counts once: the modality, and each finding."""
        confidence: list[Float64] = []
        correct: list[NDArray[np.bool_]] = []
        used: list[NDArray[np.bool_]] = []
        if self._truth.modalities:
            right = self._right(decided)
            confidence.append(decided.modality.max(1))
            correct.append(np.array(right.tops, dtype=bool))
            used.append(np.array(right.bottoms, dtype=bool))
        for name, column in zip(self._truth.findings, decided.findings.T, strict=True):
            confidence.append(np.maximum(column, 1 - column))
            correct.append((column > 0.5) == self._truth.positive[name])
            used.append(self._truth.known[name])
        place = np.stack(used)
        values = np.zeros(place.shape)
        values[place] = calibration_values(np.stack(confidence)[place], np.stack(correct)[place])
        return Sums(values.sum(0).tolist(), place.sum(0).astype(float).tolist(), self._patients)

    def _retrieval_figures(self, own: Embedded, base: Embedded, gate: TaskGate) -> list[Paired]:
        if len(self.texts) <= GATED_TOP:
            return []
        ranks, before = self._ranks(own), self._ranks(base)
        patients = [c.patient for c in self._cases if c.caption]
        found = []
        for k in (k for k in TOP if k < len(self.texts)):
            for way in ranks:
                sums, was = (means(r[way] <= k, patients) for r in (ranks, before))
                gated = (-gate.retrieval_loss, None) if k == GATED_TOP else None
                found.append(Paired(f"retrieval {way} recall@{k}", sums, was, gated, share=True))
        return found

    def _ranks(self, said: Embedded) -> dict[str, NDArray[np.int64]]:
        """Rank of each image's own caption among captions, and of its image among images."""
        place = {text: i for i, text in enumerate(self.texts)}
        rows = [i for i, c in enumerate(self._cases) if c.caption]
        columns = [place[c.caption] for c in self._cases if c.caption]
        similarity = said.images[rows].astype(np.float64) @ said.captions.astype(np.float64).T
        relevant = np.eye(len(self.texts), dtype=bool)[columns]
        return {
            "image-text": retrieval_ranks(similarity, relevant),
            "text-image": retrieval_ranks(similarity.T, relevant.T)[columns],
        }

    def _answers(self, own: Decided, base: Decided, shift: Float64) -> list[TaskAnswer]:
        names = (*(["modality"] if self._truth.modalities else []), *self._truth.findings)
        now, before = own.decisions(), base.decisions()
        answers = []
        for i, moved in enumerate(shift.tolist()):
            changes = tuple(
                f"{name}: {self._word(name, b[i])} -> {self._word(name, a[i])}"
                for name, a, b in zip(names, now, before, strict=True)
                if a[i] != b[i]
            )
            # Scored by itself, even the likeliest may have a small probability.
            least = min(0.1, own.modality[i].max(initial=0.0))
            said = [f"{m} {percent(p) if p >= 0.1 else small(p)}" for m, p in
                    zip(self._truth.modalities, own.modality[i], strict=True) if p >= least]  # fmt: skip
            said += [f"{f} {percent(p)}" for f, p in
                     zip(self._truth.findings, own.findings[i], strict=True) if p > 0.5]  # fmt: skip
            answers.append(TaskAnswer(", ".join(said), changes, moved, {"cosine": 1 - moved}))
        return answers

    def _word(self, name: str, choice: int) -> str:
        return self._truth.modalities[choice] if name == "modality" else ("no", "yes")[choice]

    def _label_rows(self, own: Decided, base: Decided) -> dict[str, LabelRow]:
        was = self._scored(base)
        rows = {}
        for name, (scores, positive, known) in self._scored(own).items():
            sums = means(auroc_values(scores, positive, known), self._patients)
            before = means(auroc_values(*was[name]), self._patients)
            rows[name] = LabelRow(
                int((positive & known).sum()), int((~positive & known).sum()),
                {"auroc": figure(sums)}, {"auroc": figure(less(sums, before))},
            )  # fmt: skip
        return rows


def _texts(said: Embedded) -> NDArray[np.float32]:
    return np.concatenate([said.labels, said.captions])


def _shift(own: NDArray[np.float32], base: NDArray[np.float32]) -> Float64:
    """1 - cosine of unit rows, at least 0. Raises `InputRefused` for another size."""
    if own.shape != base.shape:
        raise InputRefused(
            f"vectors of shape {list(own.shape)} against the reference's {list(base.shape)}; "
            "expected a model of the same kind"
        )
    # Half the squared distance is 1 - cosine without the cancellation of 1 - 0.9999999.
    gap = own.astype(np.float64) - base.astype(np.float64)
    shift: Float64 = (gap * gap).sum(axis=1) / 2
    return shift


def _shift_quantity(
    name: str, shift: Float64, clusters: Sequence[str], names: Sequence[str], gate: TaskGate
) -> Quantity:
    said = (
        f"the mean of 1 - cosine with the reference's is {shift.mean():.2g}, at worst "
        f"{shift.max():.2g} ({names[int(shift.argmax())]})"
    )
    return mean(name, means(shift, clusters), (None, gate.embedding_shift), said)
