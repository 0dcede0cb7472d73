import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from exporter.compare.quality.distribution import (
    compare_logits,
    first_difference,
    log_softmax,
    summarize,
)


def pair(seed: int, rows: int = 6, vocabulary: int = 50, step: float = 0.5) -> tuple:
    rng = np.random.default_rng(seed)
    p = rng.normal(0, 4, (rows, vocabulary)).astype(np.float32)
    q = (p + rng.normal(0, step, p.shape)).astype(np.float32)
    return p, q, rng.integers(0, vocabulary, rows - 1).tolist()


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_kl_against_scipy(seed: int, step: float) -> None:
    p, q, tokens = pair(seed, step=step)
    found = compare_logits(p, q, tokens)
    a, b = special.softmax(p.astype(float), -1), special.softmax(q.astype(float), -1)
    assert found.kl == pytest.approx(stats.entropy(a, b, axis=-1), rel=1e-6, abs=1e-12)


def test_kl_and_log_probabilities_against_torch() -> None:
    torch = pytest.importorskip("torch")
    p, q, tokens = pair(7)
    found = compare_logits(p, q, tokens)
    a = torch.log_softmax(torch.from_numpy(p).double(), -1)
    b = torch.log_softmax(torch.from_numpy(q).double(), -1)
    expected = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(expected.numpy(), rel=1e-9)
    losses = torch.nn.functional.cross_entropy(b[:-1], torch.tensor(tokens), reduction="none")
    assert -found.candidate_logprob == pytest.approx(losses.numpy(), rel=1e-9)
    assert found.agree.tolist() == (a.argmax(-1) == b.argmax(-1)).tolist()


def test_two_outcomes_closed_form() -> None:
    p, q = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert compare_logits(p, q, []).kl[0] == pytest.approx(expected, rel=1e-12)


def test_tiny_differences_keep_their_digits() -> None:
    """KL of a small step d is half its variance under p; far below what float32 sums resolve."""
    p, _, tokens = pair(8, vocabulary=2000)
    step = np.random.default_rng(9).normal(0, 1e-7, p.shape)
    weights = special.softmax(p.astype(float), -1)
    mean = (weights * step).sum(-1, keepdims=True)
    expected = 0.5 * (weights * (step - mean) ** 2).sum(-1)
    found = compare_logits(p.astype(float), p.astype(float) + step, tokens).kl
    assert found == pytest.approx(expected, rel=1e-2)


def test_equal_logits_and_shifted_logits_are_the_same_distribution() -> None:
    p, _, tokens = pair(10)
    assert compare_logits(p, p, tokens).kl.max() == 0
    assert compare_logits(p, p + np.float32(1000), tokens).kl.max() < 1e-6


def test_extreme_logits_stay_finite() -> None:
    p, q = np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])
    assert compare_logits(p, q, []).kl[0] == pytest.approx(2e4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        log_softmax(np.array([[0.0, value]]))


def test_other_shapes_are_refused() -> None:
    p, q, tokens = pair(11)
    with pytest.raises(ValueError, match="shape"):
        compare_logits(p, q[:, :-1], tokens)
    with pytest.raises(ValueError, match="tokens"):
        compare_logits(p, q, tokens[:-1])


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], []) is None


def test_summary_over_cases() -> None:
    logits = [pair(seed, rows=rows) for seed, rows in ((1, 4), (2, 7), (3, 5))]
    scores = [compare_logits(*one) for one in logits]
    found = summarize(scores, [([1, 2], [1, 2]), ([1, 2], [1, 3]), ([1], [2])])
    assert found is not None
    kl = np.concatenate([s.kl for s in scores])
    assert (found.images, found.tokens) == (3, 16)
    assert found.kl_mean == pytest.approx(kl.mean())
    assert found.kl_max == kl.max()
    assert (found.captions, found.identical, found.first_divergent) == (3, 1, 0.5)
    losses = [(s.reference_logprob, s.candidate_logprob) for s in scores]
    own = np.exp(-np.concatenate([b for _, b in losses]).mean())
    reference = np.exp(-np.concatenate([a for a, _ in losses]).mean())
    assert found.perplexity_ratio == pytest.approx(own / reference)
    assert summarize([], []) is None
