"""Encoders and summaries on answers whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.catalog.schema import TaskGate
from exporter.compare.jobs import Scores
from exporter.compare.quality.rouge import rouge1, rouge_l
from exporter.compare.quality.trust import auroc
from exporter.compare.tasks.entities import entity_figures, f1_values, span_score
from exporter.compare.tasks.jobs import Written
from exporter.compare.tasks.judge import judge_task
from exporter.compare.tasks.summary import SummaryMeasure
from exporter.compare.tasks.text_encoder import Encoded, TextEncoderMeasure, neighbours_kept
from exporter.compare.verdict import Quantity
from exporter.core.errors import InputRefused
from exporter.core.text_cases import Entity, TextCase
from tests.unit.compare.tasks.fakes import unit

GATE = TaskGate()
COUNT = 160
TEXT = "Small nodule in the left lung. No effusion."
CASES = tuple(
    TextCase(
        f"t{i:03d}", TEXT, f"p{i // 2}", "ct", "Nodule in the left lung.",
        (Entity("finding", 6, 12), Entity("anatomy", 25, 29), Entity("finding", 34, 42)),
        ("normal", "abnormal")[i % 2],
    )
    for i in range(COUNT)
)  # fmt: skip
NODULE, LUNG, EFFUSION = ("finding", 6, 12), ("anatomy", 25, 29), ("finding", 34, 42)
LABELS = ("O", "B-finding", "I-finding", "B-anatomy", "I-anatomy")


def encoded(rows: np.ndarray, head: str = "none", labels: tuple[str, ...] = ()) -> Encoded:
    return Encoded(head, rows.astype(np.float64), labels, [])


def test_neighbours_by_hand() -> None:
    angles = np.deg2rad([0, 10, 20, 90, 100])
    base = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert neighbours_kept(base, base, 2).tolist() == [1.0] * 5
    moved = base.copy()
    moved[1] = [np.cos(np.deg2rad(95)), np.sin(np.deg2rad(95))]
    # Text 1 went over to texts 3 and 4; before, the two nearest of 0 were 1 and 2.
    assert neighbours_kept(moved, base, 2).tolist() == [0.5, 0.0, 0.5, 0.5, 0.5]


def test_vectors_that_turn_fail_by_name() -> None:
    rng = np.random.default_rng(0)
    base = unit(rng.normal(size=(COUNT, 12)))
    measure = TextEncoderMeasure(CASES)
    same = measure.measure(encoded(base), encoded(base), GATE)
    assert same.figures["cosine"].value == 1.0
    assert (
        judge_task("a", "b", same, [c.patient for c in CASES], GATE, unit="texts").label == "PASS"
    )
    other = unit(base + 0.5 * rng.normal(size=base.shape))
    found = measure.measure(encoded(other), encoded(base), GATE)
    cosine = (other.astype(float) * base).sum(1)
    assert found.figures["cosine"].value == pytest.approx(cosine.mean(), abs=1e-6)
    assert found.figures["worst cosine"].value == pytest.approx(cosine.min(), abs=1e-6)
    report = judge_task("a", "b", found, [c.patient for c in CASES], GATE, unit="texts")
    assert report.verdict == "FAIL" and report.reason.startswith("vectors: the mean of 1 - cosine")


def test_labels_of_a_classification_head() -> None:
    rng = np.random.default_rng(1)
    score = np.array([i % 2 for i in range(COUNT)]) + rng.normal(size=COUNT)
    rows = 1 / (1 + np.exp(np.stack([score - 0.5, 0.5 - score], 1)))
    base = encoded(rows, "class", ("normal", "abnormal"))
    changed = rows.copy()
    changed[:20] = changed[:20, ::-1]
    own = encoded(changed, "class", ("normal", "abnormal"))
    found = TextEncoderMeasure(CASES).measure(own, base, GATE)
    assert found.figures["label agreement"].value == pytest.approx(1 - 20 / COUNT)
    truth = np.arange(COUNT) % 2 == 1
    expected = auroc(changed[:, 1], truth) - auroc(rows[:, 1], truth)
    assert found.differences["auroc"].value == pytest.approx(expected, abs=1e-9)
    assert sum(bool(a.changes) for a in found.answers) == 20
    labels = found.quantities["labels"]
    assert isinstance(labels, Quantity) and labels.verdict == "FAIL"


def test_another_head_is_refused() -> None:
    one = encoded(np.eye(COUNT), "class", ("a",))
    with pytest.raises(InputRefused, match="same kind"):
        TextEncoderMeasure(CASES).measure(encoded(np.eye(COUNT)), one, GATE)


def test_entity_f1_by_hand() -> None:
    truth = [frozenset({NODULE, LUNG, EFFUSION}), frozenset({NODULE})]
    said = [frozenset({NODULE, ("anatomy", 20, 29)}), frozenset({NODULE, EFFUSION})]
    score = span_score(truth, said)
    # Right: two; one has a wrong begin, one is not there in the truth.
    assert (score.right, score.predicted, score.truth) == (2, 4, 4)
    assert score.f1 == 0.5 and np.mean(f1_values(truth, said)) == pytest.approx(0.5)


def test_entities_against_truth_and_reference() -> None:
    whole, less = frozenset({NODULE, LUNG, EFFUSION}), frozenset({NODULE, LUNG})
    base = [whole] * COUNT
    own = [less if i < 80 else whole for i in range(COUNT)]
    found = entity_figures(CASES, own, base, LABELS, GATE)
    expected = 2 * 400 / (400 + 480)
    assert found.figures["entity F1"].value == pytest.approx(expected)
    assert found.figures["entity F1 with reference"].value == pytest.approx(expected)
    assert found.labels["anatomy"].figures["F1"].value == 1.0
    assert found.labels["finding"].figures["F1"].value == pytest.approx(2 * 240 / (240 + 320))
    assert (
        found.answers[0].changes == ("lost: finding 'effusion'",) and not found.answers[80].changes
    )
    verdicts = {n: q.verdict for n, q in found.quantities.items() if isinstance(q, Quantity)}
    assert verdicts == {"entities": "FAIL", "entity F1": "FAIL"}


def test_types_that_the_head_does_not_know_are_no_truth() -> None:
    base = [frozenset({("drug", 0, 5)})] * COUNT
    found = entity_figures(CASES, base, base, ("O", "B-drug"), GATE)
    assert found.quantities["entity F1"] == "no ground-truth entities of the head's types"
    assert found.figures["entity F1 with reference"].value == 1.0


def written(text: str, kl: float = 0.0) -> Written:
    tokens = [len(w) for w in text.split()]
    one = [kl] * (len(tokens) + 1)
    return Written(text, tokens, True, Scores(one, [kl < 1] * len(one), one[1:], one[1:]))


def test_summaries_against_truth_and_reference() -> None:
    base = [written("Nodule in the left lung.")] * COUNT
    flip = written("Nodule in the right lung.", 2.0)
    own = [flip if i % 10 == 0 else base[0] for i in range(COUNT)]
    found = SummaryMeasure(CASES).measure(own, base, GATE)
    truth = "Nodule in the left lung."
    share = rouge1(truth, "Nodule in the right lung.")
    assert found.figures["ROUGE-1"].value == pytest.approx(0.1 * share + 0.9)
    assert found.figures["ROUGE-L with reference"].value == pytest.approx(
        0.1 * rouge_l(truth, "Nodule in the right lung.") + 0.9
    )
    assert found.figures["KL"].value == pytest.approx(0.2)
    assert found.figures["facts flipped"].value == 16
    assert "flipped: laterality of nodule: left -> right" in found.answers[0].changes
    report = judge_task("a", "b", found, [c.patient for c in CASES], GATE, unit="texts")
    assert report.verdict == "FAIL"
    failed = [q.name for q in report.quantities if q.verdict == "FAIL"]
    assert "flips" in failed and "facts right" in failed
    assert report.quantity("length").verdict == report.quantity("truncation").verdict == "PASS"


def test_equal_summaries_pass() -> None:
    base = [written("Nodule in the left lung.")] * COUNT
    found = SummaryMeasure(CASES).measure(base, base, GATE)
    report = judge_task("a", "b", found, [c.patient for c in CASES], GATE, unit="texts")
    assert report.label == "PASS" and found.figures["identical"].value == 1.0


def test_without_truth_nothing_is_scored_against_it() -> None:
    plain = [TextCase(c.id, c.text, c.patient) for c in CASES]
    base = [written("Nodule in the left lung.")] * COUNT
    found = SummaryMeasure(plain).measure(base, base, GATE)
    assert found.quantities["ROUGE-1"] == "no ground-truth summaries" and not found.differences


def test_summaries_cut_short_fail_on_length() -> None:
    base = [written("Nodule in the left lung. No effusion on either side.")] * COUNT
    own = [written("Nodule in the left lung.")] * COUNT
    found = SummaryMeasure(CASES).measure(own, base, GATE)
    length = found.quantities["length"]
    assert isinstance(length, Quantity) and length.verdict == "FAIL"
    assert length.value == pytest.approx(0.5)
