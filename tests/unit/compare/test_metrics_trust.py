"""Calibration, ranking and entity figures against closed forms and brute force."""

from __future__ import annotations

import json
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exporter.cli.score import score
from exporter.compare.labelled import read_labelled, score_labelled
from exporter.compare.quality.trust import (
    EntityScore,
    adaptive_calibration_error,
    auroc,
    calibration_error,
    entities,
    entity_score,
    recall_at_k,
)
from exporter.core.errors import InputRefused

TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


def test_calibration_by_hand() -> None:
    # Two bins: (0.2, 0.3) none right, gap 0.25; (0.8, 1.0) all right, gap 0.1. Mean 0.175.
    assert calibration_error([0.2, 0.3, 0.8, 1.0], [0, 0, 1, 1], bins=2) == pytest.approx(0.175)
    # One bin: gap of the means, and over- and underconfidence cancel.
    assert calibration_error([0.2, 0.8], [1, 0], bins=1) == pytest.approx(0.0)
    assert calibration_error([0.2, 0.8], [1, 0], bins=2) == pytest.approx(0.8)


def test_bins_are_closed_on_the_right() -> None:
    # 0.5 belongs to the lower of two bins: alone there with gap 0.5, not averaged with 0.9.
    assert calibration_error([0.5, 0.9], [1, 0], bins=2) == pytest.approx((0.5 + 0.9) / 2)
    assert calibration_error([0.0], [0]) == 0.0
    assert calibration_error([1.0], [1]) == 0.0


def test_a_calibrated_source_has_little_error_and_a_constant_one_its_gap() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    right = rng.random(200_000) < confidence
    assert calibration_error(confidence, right) < 0.01
    assert adaptive_calibration_error(confidence, right) < 0.01
    # Confidence c, accuracy c ** 2: the expected gap is the integral of c - c ** 2, 1/6.
    right = rng.random(200_000) < confidence**2
    assert calibration_error(confidence, right) == pytest.approx(1 / 6, abs=0.005)
    assert adaptive_calibration_error(confidence, right) == pytest.approx(1 / 6, abs=0.005)


def test_adaptive_bins_hold_equally_many() -> None:
    # Equal width puts all four into one bin of 15 and sees nothing.
    confidence, right = [0.91, 0.92, 0.925, 0.93], [1, 1, 1, 0]
    narrow = np.mean([0.09, 0.08, 0.075, 0.93])
    assert adaptive_calibration_error(confidence, right) == pytest.approx(narrow)
    pairs = np.mean([0.17 / 2, 0.17 / 2, abs(1.855 / 2 - 0.5), abs(1.855 / 2 - 0.5)])
    assert adaptive_calibration_error(confidence, right, bins=2) == pytest.approx(pairs)


@pytest.mark.parametrize(("confidence", "right"), [([], []), ([0.5], [1, 0]), ([1.2], [1])])
def test_calibration_refuses(confidence: list[float], right: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected|outside"):
        calibration_error(confidence, right)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=25))
def test_auroc_is_the_share_of_ordered_pairs(cases: list[tuple[int, bool]]) -> None:
    positive = [s for s, label in cases if label]
    negative = [s for s, label in cases if not label]
    if not positive or not negative:
        with pytest.raises(ValueError, match="expected some of both"):
            auroc(*zip(*cases, strict=True))
        return
    pairs = [(p > n) + (p == n) / 2 for p, n in product(positive, negative)]
    found = auroc(*zip(*cases, strict=True))
    assert found == pytest.approx(float(np.mean(pairs)), rel=1e-12)
    u = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    assert found == pytest.approx(u / len(pairs), rel=1e-12)


def test_auroc_of_two_normals_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(1, 1, 20_000), rng.normal(0, 1, 20_000)])
    labels = np.arange(40_000) < 20_000
    assert auroc(scores, labels) == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.006)


def brute_recall(values: list[float], wanted: list[bool], k: int) -> float:
    """Over all orders of the items that keep the similarity falling."""
    orders = [
        order
        for order in permutations(range(len(values)))
        if all(values[a] >= values[b] for a, b in pairwise(order))
    ]
    return float(np.mean([any(wanted[i] for i in order[:k]) for order in orders]))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5), st.integers(1, 5)
)
def test_recall_counts_ties_by_their_orders(items: list[tuple[int, bool]], k: int) -> None:
    values, wanted = [float(v) for v, _ in items], [w for _, w in items]
    if not any(wanted) or k > len(items):
        with pytest.raises(ValueError, match=r"no relevant item|expected 1 to"):
            recall_at_k([values], [wanted], k)
        return
    expected = brute_recall(values, wanted, k)
    assert recall_at_k([values], [wanted], k) == pytest.approx(expected, rel=1e-12)


def test_recall_of_random_similarities_is_k_of_n() -> None:
    rng = np.random.default_rng(0)
    found = recall_at_k(rng.random((4000, 50)), np.eye(50, dtype=bool)[np.arange(4000) % 50], 5)
    assert found == pytest.approx(0.1, abs=0.015)
    assert recall_at_k(np.zeros((7, 7)), np.eye(7), 1) == pytest.approx(1 / 7)


def test_entities_by_hand() -> None:
    assert list(entities(["B-a", "I-a", "I-b", "B-b", "B-b", "I-b"])) == [
        ("a", 0, 1), ("b", 3, 3), ("b", 4, 5),
    ]  # fmt: skip
    found = entity_score(
        [["B-a", "I-a", "O", "B-b"], ["O", "I-a"]], [["B-a", "O", "O", "B-b"], ["O", "I-a"]]
    )
    assert found == EntityScore(1, 2, 2)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert entity_score([["O"]], [["O"]]).f1 == 0
    with pytest.raises(ValueError, match="tag 'S-a'"):
        entity_score([["S-a"]], [["O"]])
    with pytest.raises(ValueError, match="differ"):
        entity_score([["O"]], [["O", "O"]])


# Computed once with seqeval 1.2.2, mode="strict", scheme=IOB2, zero_division=0.
SEQEVAL = (
    ([["B-a", "I-a", "O", "B-b", "I-b"]], [["B-a", "I-a", "O", "B-b", "O"]], 0.5, 0.5, 0.5),
    ([["B-a", "I-a", "I-a"]], [["B-a", "B-a", "I-a"]], 0.0, 0.0, 0.0),
    ([["O", "B-a", "I-b", "O"]], [["O", "B-a", "I-b", "O"]], 1.0, 1.0, 1.0),
    ([["B-a", "O"], ["B-b", "I-b"]], [["B-a", "B-b"], ["I-b", "I-b"]], 0.5, 0.5, 0.5),
    ([["I-a", "I-a", "O"]], [["I-a", "I-a", "O"]], 0.0, 0.0, 0.0),
    ([["B-a", "B-a", "B-b"]], [["B-a", "B-a", "B-a"]], 2 / 3, 2 / 3, 2 / 3),
)


@pytest.mark.parametrize(("truth", "said", "precision", "recall", "f1"), SEQEVAL)
def test_entities_equal_numbers_of_seqeval(
    truth: list[list[str]], said: list[list[str]], precision: float, recall: float, f1: float
) -> None:
    found = entity_score(truth, said)
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), min_size=1), min_size=1, max_size=3)
)
def test_entities_equal_seqeval(sequences: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    truth, said = ([[pair[i] for pair in s] for s in sequences] for i in (0, 1))
    found = entity_score(truth, said)
    for name, value in (("precision_score", found.precision), ("recall_score", found.recall),
                        ("f1_score", found.f1)):  # fmt: skip
        expected = getattr(metrics, name)(
            truth, said, mode="strict", scheme=scheme, zero_division=0
        )
        assert value == pytest.approx(expected, abs=1e-12)


def lines_of(*rows: dict[str, object]) -> str:
    return "\n".join(json.dumps({"id": str(i), **row}) for i, row in enumerate(rows))


def test_score_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.jsonl"
    path.write_text(lines_of(
        {"probabilities": {"mass": 0.9, "none": 0.1}, "labels": ["mass"]},
        {"probabilities": {"mass": 0.4, "none": 0.6}, "labels": ["none"]},
        {"probabilities": {"mass": 0.4, "none": 0.6}, "labels": ["mass"]},
    ))  # fmt: skip
    result = CliRunner().invoke(score, [str(path), "--json"])
    assert result.exception is None, result.output
    found = {name: f["value"] for name, f in json.loads(result.stdout)["figures"].items()}
    assert found["auroc mass"] == found["auroc none"] == found["auroc_macro"] == 0.75
    assert found["accuracy"] == pytest.approx(2 / 3)
    # 0.9 alone (gap 0.1), twice 0.6 with one right (gap 0.1).
    assert found["ece"] == pytest.approx(0.1)


def test_score_of_ranks_and_of_tags(tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    path.write_text(lines_of(
        {"ranked": ["a", "b"], "relevant": ["a"]}, {"ranked": ["a", "b"], "relevant": ["b"]}
    ))  # fmt: skip
    result = CliRunner().invoke(score, [str(path)])
    assert "recall_at_1   0.500 [0.000, 1.000] (2 images, 2 patients)" in result.stdout
    path.write_text(lines_of({"tags": ["B-a", "O"], "true_tags": ["B-a", "B-b"]}))
    scores = score_labelled(read_labelled(path))
    assert scores.figures["entity_f1"].value == pytest.approx(2 / 3)
    assert scores.figures["entity_f1"].low is None


@pytest.mark.parametrize(
    "rows",
    [
        ({"tags": ["B-a"], "true_tags": ["O", "O"]},),
        ({"tags": ["Z"], "true_tags": ["O"]},),
        ({"probabilities": {"a": 1.5}, "labels": ["a"]},),
        ({"probabilities": {"a": 1}, "labels": ["a"]}, {"probabilities": {"b": 1}, "labels": []}),
        ({"ranked": ["a"], "relevant": ["a"]}, {"tags": [], "true_tags": []}),
        ({"ranked": 3},),
    ],
)
def test_labels_that_make_no_sense_are_refused(
    tmp_path: Path, rows: tuple[dict[str, object], ...]
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(lines_of(*rows))
    assert isinstance(CliRunner().invoke(score, [str(path)]).exception, InputRefused)
