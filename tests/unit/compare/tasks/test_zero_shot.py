"""Zero-shot figures on vectors whose cosines, labels and ranks are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.catalog.schema import TaskGate
from exporter.compare.quality.trust import auroc, calibration_error, recall_at_k
from exporter.compare.tasks.judge import judge_task
from exporter.compare.tasks.labels import FEWEST, ground_truth
from exporter.compare.tasks.measure import Annotation
from exporter.compare.tasks.zero_shot import Embedded, ZeroShotMeasure
from exporter.compare.verdict import Quantity
from exporter.core.cases import Case
from exporter.core.errors import InputRefused
from tests.unit.compare.tasks.fakes import KINDS, image_cases, unit

COUNT = 180


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ...]:
    return image_cases(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def measure(cases: tuple[Case, ...]) -> ZeroShotMeasure:
    return ZeroShotMeasure(cases, {})


@pytest.fixture(scope="module")
def embedded(cases: tuple[Case, ...], measure: ZeroShotMeasure) -> Embedded:
    """A model that sees modality and nodule, with noise, and tells captions of one kind apart."""
    rng = np.random.default_rng(0)
    labels = np.zeros((len(measure.labels), 16))
    for i in range(len(KINDS)):
        labels[i, i] = 1
    labels[3, 3], labels[4, 3] = 1, -1
    marks = rng.normal(size=(COUNT, 12)) / 4
    images = np.concatenate([np.zeros((COUNT, 4)), marks], axis=1)
    images[np.arange(COUNT), [KINDS.index(c.modality) for c in cases]] += 1
    images[:, 3] += [0.5 if i % 2 else -0.5 for i in range(COUNT)]
    images[:, :4] += rng.normal(size=(COUNT, 4)) / 2
    captions = images + np.concatenate([np.zeros((COUNT, 4)), rng.normal(size=(COUNT, 12)) / 4], 1)
    return Embedded(unit(images), unit(labels), unit(captions), 10.0)


def test_labels_are_modalities_and_what_captions_state(measure: ZeroShotMeasure) -> None:
    assert measure.labels == (*KINDS, "nodule", "no nodule")


def test_figures_are_the_definitions(
    cases: tuple[Case, ...], measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    found = measure.measure(embedded, embedded, TaskGate())
    logits = 10.0 * embedded.images.astype(float) @ embedded.labels.astype(float).T
    modality = np.exp(logits[:, :3]) / np.exp(logits[:, :3]).sum(1, keepdims=True)
    nodule = 1 / (1 + np.exp(logits[:, 4] - logits[:, 3]))
    truth = np.array([KINDS.index(c.modality) for c in cases])
    there = np.arange(COUNT) % 2 == 1
    areas = [auroc(modality[:, i], truth == i) for i in range(3)] + [auroc(nodule, there)]
    assert found.figures["auroc"].value == pytest.approx(np.mean(areas), abs=1e-9)
    assert [found.labels[n].figures["auroc"].value for n in (*KINDS, "nodule")] == pytest.approx(
        areas, abs=1e-9
    )
    assert found.labels["nodule"].positives == 90
    right = modality.argmax(1) == truth
    assert found.figures["accuracy"].value == pytest.approx(right.mean())
    confidence = np.concatenate([modality.max(1), np.maximum(nodule, 1 - nodule)])
    hits = np.concatenate([right, (nodule > 0.5) == there])
    assert found.figures["ece"].value == pytest.approx(
        calibration_error(confidence, hits), abs=1e-9
    )
    similarity = embedded.images.astype(float) @ embedded.captions.astype(float).T
    for k in (1, 5, 10):
        for way, values in (("image-text", similarity), ("text-image", similarity.T)):
            expected = recall_at_k(values, np.eye(COUNT, dtype=bool), k)
            assert found.figures[f"retrieval {way} recall@{k}"].value == pytest.approx(expected)


def test_a_bias_scores_each_modality_by_itself_and_leaves_findings_to_their_denial(
    cases: tuple[Case, ...], measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    """SigLIP's probabilities: other areas and another calibration, the same choices."""
    alone, shared = (
        measure.measure(e, embedded, TaskGate()) for e in (replace(embedded, bias=-9.0), embedded)
    )
    logits = 10.0 * embedded.images.astype(float) @ embedded.labels.astype(float).T - 9.0
    modality = 1 / (1 + np.exp(-logits[:, :3]))
    truth = np.array([KINDS.index(c.modality) for c in cases])
    areas = [auroc(modality[:, i], truth == i) for i in range(3)]
    assert [alone.labels[n].figures["auroc"].value for n in KINDS] == pytest.approx(areas, abs=1e-9)
    assert alone.labels["nodule"].figures == shared.labels["nodule"].figures
    nodule = 1 / (1 + np.exp(logits[:, 4] - logits[:, 3]))
    confidence = np.concatenate([modality.max(1), np.maximum(nodule, 1 - nodule)])
    hits = [modality.argmax(1) == truth, (nodule > 0.5) == (np.arange(COUNT) % 2 == 1)]
    assert alone.figures["ece"].value == pytest.approx(
        calibration_error(confidence, np.concatenate(hits)), abs=1e-9
    )
    assert alone.figures["ece"].value != shared.figures["ece"].value
    assert alone.figures["accuracy"].value == shared.figures["accuracy"].value
    assert not any(a.changes for a in alone.answers)
    # The likeliest is named, however small its probability.
    assert all(a.said.split()[0].strip(",") in KINDS for a in alone.answers)
    assert min(modality.max(1)) < 0.1


def test_the_reference_against_itself_passes(
    cases: tuple[Case, ...], measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    found = measure.measure(embedded, embedded, TaskGate())
    report = judge_task(
        "same", "fp16", found, [c.patient for c in cases], TaskGate(), unit="images"
    )
    assert report.label == "PASS"
    assert found.figures["cosine"].value == found.figures["worst cosine"].value == 1.0
    assert not any(a.changes or a.distance for a in found.answers)


def test_cosines_are_those_of_the_turned_vectors(
    measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    # Every image vector turned by the same angle in a plane of two unused directions.
    angle = 0.3
    wide = [
        np.pad(v, ((0, 0), (0, 2))) for v in (embedded.images, embedded.labels, embedded.captions)
    ]
    base = Embedded(wide[0], wide[1], wide[2], 10.0)
    turned = np.cos(angle) * wide[0]
    turned[:, -1] = np.sin(angle)
    found = measure.measure(replace(base, images=turned), base, TaskGate())
    assert found.figures["cosine"].value == pytest.approx(np.cos(angle), abs=1e-6)
    vectors = found.quantities["image vectors"]
    assert isinstance(vectors, Quantity) and vectors.verdict == "FAIL"
    texts = found.quantities["text vectors"]
    assert isinstance(texts, Quantity) and texts.verdict == "PASS"
    # All cosines shrink alike: labels and order stay.
    assert found.differences["auroc"].value == pytest.approx(0, abs=1e-3)


def test_one_modality_gone_is_seen_with_the_right_reason(
    cases: tuple[Case, ...], measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    images = embedded.images.copy()
    gone = [i for i, c in enumerate(cases) if c.modality == "mri"]
    images[gone] = embedded.images[0]
    found = measure.measure(replace(embedded, images=images), embedded, TaskGate())
    report = judge_task("bad", "fp16", found, [c.patient for c in cases], TaskGate(), unit="images")
    assert report.verdict == "FAIL" and report.reason.startswith("image vectors")
    failed = {q.name for q in report.quantities if q.verdict == "FAIL"}
    assert {"labels", "auroc", "retrieval image-text recall@5"} <= failed
    changed = [a for a in found.answers if any(c.startswith("modality: mri") for c in a.changes)]
    assert len(changed) > 40
    assert found.labels["mri"].differences["auroc"].value < -0.2


def test_a_finding_turned_over_fails_though_modality_and_auroc_stay(
    cases: tuple[Case, ...], measure: ZeroShotMeasure, embedded: Embedded
) -> None:
    """Present for absent on some images, by exchanging a finding's text with its denial's."""
    place = len(measure._truth.modalities)
    labels = embedded.labels.copy()
    labels[[place, place + 1]] = labels[[place + 1, place]]
    found = measure.measure(replace(embedded, labels=labels), embedded, TaskGate())
    quantity = found.quantities["findings"]
    assert isinstance(quantity, Quantity) and quantity.verdict == "FAIL"
    assert measure._truth.findings[0] in quantity.said
    modality = found.quantities["labels"]
    assert isinstance(modality, Quantity) and modality.verdict == "PASS"
    turned = [a for a in found.answers if any("->" in change for change in a.changes)]
    assert round(quantity.value * len(cases)) == len(turned) > 5


def test_a_small_set_is_inconclusive_and_says_how_many_are_needed(
    tmp_path: Path, embedded: Embedded
) -> None:
    few = image_cases(tmp_path, 20)
    measure = ZeroShotMeasure(few, {})
    part = replace(embedded, images=embedded.images[:20], captions=embedded.captions[:20])
    found = measure.measure(part, part, TaskGate())
    report = judge_task("few", "fp16", found, [c.patient for c in few], TaskGate(), unit="images")
    assert report.label == "INCONCLUSIVE (smoke test)" and report.needed == 149


def test_annotations_come_before_captions(cases: tuple[Case, ...]) -> None:
    marked = {
        c.id: Annotation(c.id, {"effusion": i < 10, "rare": i == 0}) for i, c in enumerate(cases)
    }
    labels = ground_truth(cases, marked)
    assert labels.findings == ("effusion",)
    assert labels.positive["effusion"].sum() == 10 and labels.known["effusion"].all()


def test_open_statements_are_not_scored(cases: tuple[Case, ...]) -> None:
    worded = [
        Case(c.id, c.image, c.patient, c.modality, text)
        for c, text in zip(
            cases, ["Possible mass."] * 3 + ["A mass."] * FEWEST + ["Normal."] * 20, strict=False
        )
    ]
    labels = ground_truth(worded, {})
    assert labels.known["mass"].sum() == FEWEST + 20 and "mass" in labels.findings


def test_without_labels_and_captions_it_is_said_what_was_not_measured(tmp_path: Path) -> None:
    plain = [
        Case(c.id, c.image, c.patient, "ct", None) for c in image_cases(tmp_path, 6, captions=False)
    ]
    measure = ZeroShotMeasure(plain, {})
    vectors = Embedded(
        unit(np.eye(6)), np.zeros((0, 6), np.float32), np.zeros((0, 6), np.float32), 1.0
    )
    found = measure.measure(vectors, vectors, TaskGate())
    assert {n for n, q in found.quantities.items() if isinstance(q, str)} == {
        "labels", "findings", "auroc", "retrieval",
    }  # fmt: skip


def test_vectors_of_another_size_are_refused(measure: ZeroShotMeasure, embedded: Embedded) -> None:
    other = replace(embedded, images=embedded.images[:, :8])
    with pytest.raises(InputRefused, match="same kind"):
        measure.measure(other, embedded, TaskGate())
