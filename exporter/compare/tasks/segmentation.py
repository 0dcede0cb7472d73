"""Text-prompted masks beside the reference's and the ground truth's: Dice and IoU, per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.catalog.schema import TaskGate
from exporter.compare.decide import Sums, mean, rate
from exporter.compare.quality.facts import extract_facts
from exporter.compare.records import Figure
from exporter.compare.tasks.jobs import TaskJobCase, TaskResult, read_array
from exporter.compare.tasks.linear import Paired, figure, means, plain
from exporter.compare.tasks.measure import Annotation, Draw, Measured, Subject
from exporter.compare.tasks.records import LabelRow, TaskAnswer, Unit
from exporter.compare.verdict import Quantity
from exporter.core.cases import Case
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.runtimes.images import open_image

MOST_TEXTS = 4
LOST = 0.5
NO_TRUTH = "the set has no masks"
# Outlines of the masks: what only the reference has, only the candidate, both.
COLOURS = {"reference": (255, 196, 0), "candidate": (0, 176, 255), "both": (60, 200, 90)}
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """How much two masks have in common; two empty ones agree wholly."""

    dice: float
    iou: float


def overlap(one: Mask, other: Mask) -> Overlap:
    """Dice (1945) and intersection over union of two masks ``[height, width]``.

    Raises ValueError for other shapes.
    """
    if one.shape != other.shape:
        raise ValueError(f"masks of shape {one.shape} and {other.shape}")
    both, either = int((one & other).sum()), int((one | other).sum())
    if not either:
        return Overlap(1.0, 1.0)
    return Overlap(2 * both / (either + both), both / either)


class SegmentationMeasure:
    """`Measure` of models that give a mask for an image and a text.

    Asked is for the labels that the set has masks of or, without any, for the findings, devices and
    organs that its ground-truth captions state to be there, at most four an image, and else for the
    modality. `read` gives masks ``[texts, height, width]`` per case.
    """

    unit: Unit = "images"
    texts: Sequence[str] = ()

    def __init__(self, cases: Sequence[Case], annotations: Mapping[str, Annotation]) -> None:
        self._cases = cases
        self._asked = [_asked(c, annotations.get(c.id)) for c in cases]
        self._truth = {i: a.masks for i, a in annotations.items() if a.masks}
        self.labels = tuple(sorted({t for texts in self._asked for t in texts}))
        self.subjects = [
            Subject(c.id, c.patient, c.modality, c.image, ", ".join(texts),
                    {"caption": c.caption} if c.caption else {})
            for c, texts in zip(cases, self._asked, strict=True)
        ]  # fmt: skip

    def job_cases(self) -> tuple[TaskJobCase, ...]:
        """Each image with its own texts."""
        return tuple(
            TaskJobCase(c.id, sha256_file(c.image), image=str(c.image.resolve()), texts=texts)
            for c, texts in zip(self._cases, self._asked, strict=True)
        )

    def read(self, result: TaskResult, folder: Path) -> list[Mask]:
        """The masks that a worker left. Raises `InputRefused`."""
        masks = []
        if [len(times) for times in result.seconds.values()] != [len(self._cases)]:
            raise InputRefused(f"{folder}: not the masks of these images; remove the work folder")
        for index, texts in enumerate(self._asked):
            shape = read_array(folder, f"shape-{index}").tolist()
            bits = np.unpackbits(
                np.asarray(read_array(folder, f"mask-{index}"), dtype=np.uint8),
                axis=-1,
                count=shape[-1],
            )
            if shape[0] != len(texts) or bits.shape != tuple(shape):
                raise InputRefused(f"{folder}: masks of shape {shape}; remove the work folder")
            masks.append(bits.astype(bool))
        return masks

    def measure(self, own: Sequence[Mask], base: Sequence[Mask], gate: TaskGate) -> Measured:
        """All figures, differences and quantities of one model."""
        near = self._overlaps(own, base)
        patients = [c.patient for c in self._cases]
        worst = [min(o.dice for o in row) for row in near]
        shift = _sums([[1 - o.dice for o in row] for row in near], patients)
        lowest = int(np.argmin(worst))
        figures = {
            "Dice with reference": figure(_sums([[o.dice for o in r] for r in near], patients)),
            "IoU with reference": figure(_sums([[o.iou for o in r] for r in near], patients)),
            "worst Dice with reference": plain(min(worst), patients),
        }
        lost = [d < LOST for d in worst]
        quantities: dict[str, Quantity | str] = {
            "masks lost": rate(
                "masks lost", lost, patients, gate.mask_loss,
                f"a mask has a Dice under {LOST:g} with the reference's on {sum(lost)} of "
                f"{len(lost)} images",
            ),
            "masks": mean(
                "masks", shift, (None, gate.mask_shift),
                f"the mean of 1 - Dice with the reference's is "
                f"{sum(shift.tops) / sum(shift.bottoms):.3f}, the worst image has {min(worst):.3f} "
                f"({self._cases[lowest].id})",
            ),
        }  # fmt: skip
        differences: dict[str, Figure] = {}
        true = self._true_overlaps(own), self._true_overlaps(base)
        for pair in self._against_truth(*true, patients, gate):
            figures[pair.name], differences[pair.name] = pair.figure, pair.difference
            if pair.margin is not None:
                quantities[pair.name] = pair.quantity()
        if not differences:
            quantities["Dice"] = NO_TRUTH
        labels = self._label_rows(near, true[0], true[1])
        return Measured(figures, differences, quantities, self._answers(own, base, near), labels)

    def method(self) -> dict[str, str]:
        """How each figure was measured."""
        return {
            "masks": (
                "probability over 0.5, at the image's size; Dice and intersection over union per "
                "image and text, two empty masks agree wholly; the mean is over images and texts"
            ),
            "texts": (
                "labels of the set's masks or, without any, findings, devices and organs that the "
                "ground-truth captions state, else the modality"
            ),
        }

    @property
    def draw(self) -> Draw | None:
        """Image beside both models' masks."""
        return self._draw

    def _draw(
        self, own: Sequence[Mask], base: Sequence[Mask], ids: Sequence[str], folder: Path
    ) -> dict[str, Path]:
        made = {}
        for index, case in enumerate(self._cases):
            if case.id not in ids:
                continue
            picture = open_image(case.image).convert("RGB")
            worst = int(np.argmin([o.dice for o in self._pairs(own[index], base[index])]))
            drawn = draw_masks(picture, base[index][worst], own[index][worst])
            made[case.id] = folder / f"{index:06d}.png"
            drawn.save(made[case.id])
        return made

    def _pairs(self, one: Mask, other: Mask) -> list[Overlap]:
        return [overlap(a, b) for a, b in zip(one, other, strict=True)]

    def _overlaps(self, own: Sequence[Mask], base: Sequence[Mask]) -> list[list[Overlap]]:
        try:
            return [self._pairs(a, b) for a, b in zip(own, base, strict=True)]
        except ValueError as error:
            raise InputRefused(f"{error}; expected a model of the same kind") from error

    def _true_overlaps(self, masks: Sequence[Mask]) -> list[list[Overlap]]:
        found = []
        for case, texts, row in zip(self._cases, self._asked, masks, strict=True):
            files = self._truth.get(case.id, {})
            found.append([
                overlap(row[texts.index(label)], read_mask(Path(file), row.shape[1:]))
                for label, file in files.items()
            ])  # fmt: skip
        return found

    def _against_truth(
        self,
        own: list[list[Overlap]],
        base: list[list[Overlap]],
        patients: Sequence[str],
        gate: TaskGate,
    ) -> list[Paired]:
        if not any(own):
            return []
        dice, iou = (
            [_sums([[getattr(o, name) for o in r] for r in side], patients) for side in (own, base)]
            for name in ("dice", "iou")
        )
        return [
            Paired("Dice", dice[0], dice[1], (-gate.dice_loss, None)),
            Paired("IoU", iou[0], iou[1]),
        ]

    def _label_rows(
        self,
        near: list[list[Overlap]],
        own: list[list[Overlap]],
        base: list[list[Overlap]],
    ) -> dict[str, LabelRow]:
        rows = {}
        for label in self.labels:
            have = [i for i, texts in enumerate(self._asked) if label in texts]
            patients = [self._cases[i].patient for i in have]
            values = [near[i][self._asked[i].index(label)].dice for i in have]
            figures = {"Dice with reference": figure(means(values, patients))}
            differences = {}
            true = [i for i in have if label in self._truth.get(self._cases[i].id, {})]
            if true:
                now, was = (
                    means([side[i][self._place(i, label)].dice for i in true],
                          [self._cases[i].patient for i in true])
                    for side in (own, base)
                )  # fmt: skip
                pair = Paired("Dice", now, was)
                figures["Dice"], differences["Dice"] = pair.figure, pair.difference
            rows[label] = LabelRow(len(have), None, figures, differences)
        return rows

    def _place(self, index: int, label: str) -> int:
        return list(self._truth[self._cases[index].id]).index(label)

    def _answers(
        self, own: Sequence[Mask], base: Sequence[Mask], near: list[list[Overlap]]
    ) -> list[TaskAnswer]:
        answers = []
        for texts, now, before, row in zip(self._asked, own, base, near, strict=True):
            changes = tuple(
                f"{text}: Dice {o.dice:.2f} with the reference's mask, {int(a.sum())} pixels instead "
                f"of {int(b.sum())}"
                for text, a, b, o in zip(texts, now, before, row, strict=True)
                if o.dice < LOST
            )
            said = ", ".join(
                f"{text} {int(a.sum())} pixels" for text, a in zip(texts, now, strict=True)
            )
            values = {f"Dice {t}": o.dice for t, o in zip(texts, row, strict=True)}
            answers.append(TaskAnswer(said, changes, 1 - min(o.dice for o in row), values))
        return answers


def read_mask(path: Path, shape: tuple[int, ...]) -> Mask:
    """A ground-truth mask ``[height, width]``: what is over 127 in gray. Raises `InputRefused`."""
    image = open_image(path).convert("L")
    mask: Mask = np.asarray(image) > 127
    if mask.shape != shape:
        raise InputRefused(
            f"{path}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of "
            f"{shape[1]} x {shape[0]}; expected the image's size"
        )
    return mask


def draw_masks(image: Image.Image, base: Mask, own: Mask) -> Image.Image:
    """The image with both masks over it, by `COLOURS`: one alone or both."""
    pixels = np.asarray(image, dtype=np.float64).copy()
    for area, name in (
        (base & ~own, "reference"),
        (own & ~base, "candidate"),
        (own & base, "both"),
    ):
        pixels[area] = 0.5 * pixels[area] + 0.5 * np.array(COLOURS[name], dtype=np.float64)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _asked(case: Case, marked: Annotation | None) -> tuple[str, ...]:
    if marked is not None and marked.masks:
        return tuple(marked.masks)
    if case.caption is None:
        return (case.modality,)
    found = extract_facts(case.caption)
    there = [s.concept for s in found.statements if s.status == "present"]
    there += [f.value for f in found.loose if f.kind == "anatomy"]
    return tuple(dict.fromkeys(there))[:MOST_TEXTS] or (case.modality,)


def _sums(rows: Sequence[Sequence[float]], patients: Sequence[str]) -> Sums:
    """Every mask counts once: sums and numbers per image."""
    return Sums([sum(row) for row in rows], [float(len(row)) for row in rows], patients)
