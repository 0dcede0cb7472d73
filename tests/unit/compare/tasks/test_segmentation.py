"""Masks against masks: overlap by hand, ground truth, drawing, and what the gate says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.catalog.schema import TaskGate
from exporter.compare.tasks.judge import judge_task
from exporter.compare.tasks.measure import Annotation, read_annotations
from exporter.compare.tasks.segmentation import (
    COLOURS,
    SegmentationMeasure,
    draw_masks,
    overlap,
    read_mask,
)
from exporter.compare.verdict import Quantity
from exporter.core.cases import Case
from exporter.core.errors import InputRefused
from tests.unit.compare.tasks.fakes import image_cases, result

COUNT = 160
SHAPE = (8, 10)


def mask(*rows: int) -> np.ndarray:
    made = np.zeros(SHAPE, bool)
    made[list(rows)] = True
    return made


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ...]:
    return image_cases(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def annotations(
    cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Annotation]:
    """The nodule of every image is its first four rows."""
    folder = tmp_path_factory.mktemp("masks")
    Image.fromarray((255 * mask(0, 1, 2, 3)).astype(np.uint8)).save(folder / "nodule.png")
    lines = [f'{{"id": "{c.id}", "masks": {{"nodule": "nodule.png"}}}}\n' for c in cases]
    (folder / "annotations.jsonl").write_text("".join(lines), "utf-8")
    return read_annotations(folder / "annotations.jsonl")


def test_overlap_by_hand() -> None:
    found = overlap(mask(0, 1, 2), mask(2, 3))
    assert found.dice == pytest.approx(2 * 1 / (3 + 2)) and found.iou == pytest.approx(1 / 4)
    assert overlap(mask(), mask()).dice == 1.0 and overlap(mask(0), mask()).dice == 0.0
    with pytest.raises(ValueError, match="shape"):
        overlap(mask(0), mask(0)[:4])


def test_figures_against_reference_and_truth(
    cases: tuple[Case, ...], annotations: dict[str, Annotation]
) -> None:
    measure = SegmentationMeasure(cases, annotations)
    assert measure.labels == ("nodule",)
    base = [mask(0, 1, 2)[None]] * COUNT
    own = [mask(0, 1)[None]] * COUNT
    found = measure.measure(own, base, TaskGate())
    # 2 * 2 / (2 + 3) with the reference; 4 rows are true.
    assert found.figures["Dice with reference"].value == pytest.approx(0.8)
    assert found.figures["IoU with reference"].value == pytest.approx(2 / 3)
    assert found.figures["Dice"].value == pytest.approx(2 * 2 / 6)
    assert found.differences["Dice"].value == pytest.approx(2 * 2 / 6 - 2 * 3 / 7)
    assert found.labels["nodule"].differences["Dice"].value == pytest.approx(2 / 3 - 6 / 7)
    report = judge_task("own", "fp16", found, [c.patient for c in cases], TaskGate(), unit="images")
    assert [q.verdict for q in report.quantities] == ["PASS", "FAIL", "FAIL"]
    assert report.reason.startswith("masks: the mean of 1 - Dice with the reference's is 0.200")


def test_a_lost_mask_is_named(cases: tuple[Case, ...]) -> None:
    measure = SegmentationMeasure(cases, {})
    base = [np.stack([mask(0, 1)] * len(t)) for t in (c.texts for c in measure.job_cases())]
    own = list(base)
    own[5] = np.zeros_like(base[5])
    found = measure.measure(own, base, TaskGate())
    assert [i for i, a in enumerate(found.answers) if a.changes] == [5]
    assert "0 pixels instead of 20" in found.answers[5].changes[0]
    assert found.figures["worst Dice with reference"].value == 0.0
    assert found.quantities["Dice"] == "the set has no masks"
    lost = found.quantities["masks lost"]
    assert isinstance(lost, Quantity) and lost.value == pytest.approx(1 / COUNT)


def test_without_masks_the_captions_say_what_to_ask(cases: tuple[Case, ...]) -> None:
    asked = [c.texts for c in SegmentationMeasure(cases, {}).job_cases()]
    # "No nodule": nothing is there, so the modality is asked for.
    assert asked[:3] == [("ct",), ("nodule",), ("x-ray",)]


def test_masks_survive_the_files(cases: tuple[Case, ...], tmp_path: Path) -> None:
    measure = SegmentationMeasure(cases[:2], {})
    masks = [mask(0, 3)[None], mask(7)[None]]
    arrays = {f"mask-{i}": np.packbits(m, axis=-1) for i, m in enumerate(masks)}
    shapes = {f"shape-{i}": np.array(m.shape) for i, m in enumerate(masks)}
    np.savez(tmp_path / "arrays.npz", **arrays, **shapes)
    read = measure.read(result(seconds={"image": [0.1, 0.1]}), tmp_path)
    assert all((a == b).all() for a, b in zip(read, masks, strict=True))
    with pytest.raises(InputRefused, match="not the masks of these images"):
        measure.read(result(seconds={"image": [0.1]}), tmp_path)


def test_pictures_show_both_masks(cases: tuple[Case, ...], tmp_path: Path) -> None:
    measure = SegmentationMeasure(cases[:4], {})
    assert measure.draw is not None
    base, own = [mask(0, 1)[None]] * 4, [mask(1, 2)[None]] * 4
    made = measure.draw(own, base, ["c002"], tmp_path)
    assert list(made) == ["c002"]
    with Image.open(made["c002"]) as picture:
        pixels = np.asarray(picture)
    gray = 10
    for row, name in ((0, "reference"), (1, "both"), (2, "candidate")):
        expected = 0.5 * gray + 0.5 * np.array(COLOURS[name])
        assert np.abs(pixels[row, 0] - expected).max() <= 1
    assert (pixels[5] == gray).all()


def test_drawing_leaves_the_image_alone() -> None:
    image = Image.new("RGB", (SHAPE[1], SHAPE[0]), (10, 20, 30))
    draw_masks(image, mask(0), mask(1))
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("L", (3, 4)).save(tmp_path / "mask.png")
    with pytest.raises(InputRefused, match="3 x 4 pixels for an image of 10 x 8"):
        read_mask(tmp_path / "mask.png", SHAPE)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "a", "masks": {"x": "../m.png"}}', "not a path beside"),
        ('{"id": "a", "masks": {"x": "/m.png"}}', "not a path beside"),
        ('{"id": "a", "masks": {"x": "none.png"}}', "missing"),
        ('{"id": "a"}\n{"id": "a"}', "twice"),
        ('{"id": 1}', "expected id, labels, masks"),
        ("[", "expected id, labels, masks"),
    ],
)
def test_bad_annotations_are_refused(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line, "utf-8")
    with pytest.raises(InputRefused, match=why):
        read_annotations(tmp_path / "a.jsonl")
