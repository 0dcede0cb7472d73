"""ROUGE and BLEU against the packages that define them, and against numbers they once gave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.compare.captions.base import Pair
from exporter.compare.captions.bleu import Bleu, bleu, bleu_counts, tokens_13a
from exporter.compare.quality.rouge import rouge_l, rouge_l_sum, rouge_n

NUMBERS = json.loads((Path(__file__).parent / "metric_numbers.json").read_text())
PAIRS = [Pair(str(i), truth, said) for i, (truth, said) in enumerate(NUMBERS["pairs"])]
WORDS = st.lists(
    st.sampled_from(
        ["left", "Left", "a", "nodule", "3.5", "mm", "no", "x-ray", "é", "5-7", ",", ".", "&amp;",
         "(arrow)", "\n", "left,", "lung.", "[1]", "'s", "-\n", "5,000", "..", "~"]
    ),
    max_size=14,
).map(" ".join)  # fmt: skip


def test_bleu_equals_numbers_of_sacrebleu() -> None:
    found = Bleu().score(PAIRS)
    for order in range(1, 5):
        assert found[f"bleu{order}"].value == pytest.approx(NUMBERS["bleu"][order - 1], rel=1e-12)
    each = bleu(np.array([bleu_counts(p.truth, p.said) for p in PAIRS]), effective_order=True)
    np.testing.assert_allclose(each, NUMBERS["sentence_bleu4"], rtol=1e-12)
    assert found["sentence_bleu4"].value == pytest.approx(float(np.mean(each)), rel=1e-12)


def test_rouge_equals_numbers_of_rouge_score() -> None:
    for name, score in (("rouge1", lambda t, s: rouge_n(t, s, 1)),
                        ("rouge2", lambda t, s: rouge_n(t, s, 2)),
                        ("rougeL", rouge_l), ("rougeLsum", rouge_l_sum)):  # fmt: skip
        found = [score(p.truth, p.said) for p in PAIRS if p.truth]
        assert found == pytest.approx(NUMBERS[name], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_bleu_equals_sacrebleu(texts: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu is not installed")
    pairs = [Pair(str(i), truth, said) for i, (truth, said) in enumerate(texts)]
    found = Bleu().score(pairs)
    for order in range(1, 5):
        corpus = sacrebleu.BLEU(max_ngram_order=order)
        expected = corpus.corpus_score([p.said for p in pairs], [[p.truth for p in pairs]]).score
        assert found[f"bleu{order}"].value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        single = sacrebleu.BLEU(max_ngram_order=order, effective_order=True)
        scores = [single.sentence_score(p.said, [p.truth]).score for p in pairs]
        mean = found[f"sentence_bleu{order}"].value
        assert mean == pytest.approx(float(np.mean(scores)), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | WORDS)
def test_tokens_equal_sacrebleus(text: str) -> None:
    module = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a", reason="no sacrebleu")
    assert tokens_13a(text) == module.Tokenizer13a()(text.rstrip()).split()


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_rouge_equals_rouge_score(truth: str, said: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="no rouge-score").RougeScorer(
        ["rouge2", "rougeL", "rougeLsum"], use_stemmer=False
    )
    if not any(c.isascii() and c.isalnum() for c in truth + said):
        assert rouge_l(truth, said) == rouge_l_sum(truth, said) == rouge_n(truth, said, 2) == 1.0
        return
    expected = scorer.score(truth, said)
    assert rouge_n(truth, said, 2) == expected["rouge2"].fmeasure
    assert rouge_l(truth, said) == expected["rougeL"].fmeasure
    assert rouge_l_sum(truth, said) == pytest.approx(expected["rougeLsum"].fmeasure, rel=1e-12)


def test_bleu_of_nothing_said_is_zero() -> None:
    found = Bleu().score([Pair("a", "a nodule", ""), Pair("b", "", "")])
    assert all(tally.value == 0.0 for tally in found.values())


def test_corpus_bleu_by_hand() -> None:
    # 3 of 4 words, 1 of 3 bigrams, as long as the reference: sqrt(3/4 * 1/3) = 0.5.
    tally = Bleu().score([Pair("a", "no left pleural effusion", "no right pleural effusion")])
    assert tally["bleu2"].value == pytest.approx(100 * (3 / 4 * 1 / 3) ** 0.5)
