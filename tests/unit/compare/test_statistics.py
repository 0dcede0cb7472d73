import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from exporter.compare.statistics import (
    binomial_cdf,
    bootstrap_ratio,
    clopper_pearson,
    cluster_sums,
    clustered_mean,
    early_stopping_percentile,
)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.001, 0.999))
def test_binomial_against_scipy(k: int, n: int, p: float) -> None:
    assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), abs=1e-10)


@given(st.integers(1, 800).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_clopper_pearson_against_scipy(pair: tuple[int, int]) -> None:
    events, trials = pair
    expected = stats.binomtest(events, trials).proportion_ci(0.95, method="exact")
    found = clopper_pearson(events, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_flip_in_149_shows_under_two_per_cent_one_sided() -> None:
    assert clopper_pearson(0, 149, confidence=0.90).high < 0.02 < clopper_pearson(0, 148, 0.90).high


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 events"):
        clopper_pearson(3, 2)


def test_cluster_sums_keep_order() -> None:
    assert cluster_sums([1, 2, 3, 4], ["b", "a", "b", "c"]).tolist() == [4, 2, 4]


def test_bootstrap_of_independent_values_matches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap_ratio(values.tolist(), [1.0] * 400, list(range(400)))
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + error, abs=0.02)


def test_bootstrap_knows_that_images_of_a_patient_are_alike() -> None:
    patients = np.random.default_rng(2).normal(0, 1, 40)
    repeated = np.repeat(patients, 10)
    clusters = np.repeat(np.arange(40), 10).tolist()
    one = bootstrap_ratio(patients.tolist(), [1.0] * 40, list(range(40)))
    ten = bootstrap_ratio(repeated.tolist(), [1.0] * 400, clusters)
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))


def test_bootstrap_covers_a_ratio_as_often_as_it_says() -> None:
    """Simulated: 60 patients with 1 to 5 images, facts of a known rate; coverage near 95 per cent."""
    rng = np.random.default_rng(3)
    covered = 0
    for run in range(200):
        sizes = rng.integers(1, 6, 60)
        totals = rng.integers(3, 8, sizes.sum())
        rate = np.repeat(rng.beta(18, 2, 60), sizes)
        right = rng.binomial(totals, rate)
        clusters = np.repeat(np.arange(60), sizes).tolist()
        found = bootstrap_ratio(right.tolist(), totals.tolist(), clusters, resamples=1000, seed=run)
        covered += found.low <= 0.9 <= found.high
    assert 178 <= covered <= 200


def test_bootstrap_repeats_itself_and_says_when_it_cannot_know() -> None:
    values, clusters = [0.1, 0.4, 0.2], ["a", "b", "b"]
    assert bootstrap_ratio(values, [1, 1, 1], clusters) == bootstrap_ratio(
        values, [1, 1, 1], clusters
    )
    alone = bootstrap_ratio(values, [1, 1, 1], ["a", "a", "a"])
    assert (alone.low, alone.high) == (-float("inf"), float("inf"))
    with pytest.raises(ValueError, match="zero"):
        bootstrap_ratio([0.0], [0.0], ["a"])


def test_clustered_error_matches_simulation() -> None:
    rng = np.random.default_rng(4)
    means, errors = [], []
    for _ in range(2000):
        centres = rng.normal(1, 0.5, 30)
        counts = rng.integers(5, 20, 30)
        sums = [rng.normal(c, 0.3, n).sum() for c, n in zip(centres, counts, strict=True)]
        mean, error = clustered_mean(sums, counts.tolist())
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_clustered_error_of_single_items_is_the_usual_one() -> None:
    values = np.random.default_rng(5).normal(size=50)
    mean, error = clustered_mean(values.tolist(), [1] * 50)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(stats.sem(values))


@pytest.mark.parametrize(
    ("count", "percentile", "enough"),
    [(63, 0.9, False), (64, 0.9, True), (661, 0.99, False), (662, 0.99, True)],
)
def test_early_stopping_needs_the_published_number_of_runs(
    count: int, percentile: float, enough: bool
) -> None:
    found = early_stopping_percentile(list(range(count)), percentile)
    assert (found is not None) == enough
    if enough:
        assert found == count - 1


def test_early_stopping_bound_is_above_the_percentile_nearly_always() -> None:
    rng = np.random.default_rng(6)
    truth = -np.log(0.1)
    bounds = [
        early_stopping_percentile(rng.exponential(size=100).tolist(), 0.9) for _ in range(500)
    ]
    assert np.mean([b is not None and b >= truth for b in bounds]) >= 0.98
