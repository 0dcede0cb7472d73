from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.static8 import dequantize_static
from exporter.quantizers.smooth import (
    Observed,
    Smoothed,
    SmoothSettings,
    code_inputs,
    smooth,
    static_matrix,
)

Array = NDArray[np.float32]
SETTINGS = SmoothSettings()


def case(outlier: float) -> tuple[Array, Array, Observed, Array]:
    """Inputs with two channels far larger than the rest, a matrix, and the norm before it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 96)).astype(np.float32)
    x[:, [7, 50]] *= outlier
    w = (0.05 * rng.standard_normal((64, 96))).astype(np.float32)
    norm = rng.uniform(0.5, 2, 96).astype(np.float16).astype(np.float32)
    return x, w, Observed(x.min(axis=0), x.max(axis=0), x[:200]), norm


def lost(x: Array, w: Array, chosen: Smoothed) -> float:
    """Relative error of the outputs for all inputs, by the definitions alone, in float64."""
    m = static_matrix(w, chosen)
    inputs = (x / chosen.scales).astype("f8")
    codes = np.clip(np.rint(inputs / m.input_scale) + m.input_zero, 0, 255) - m.input_zero
    y = codes * m.input_scale @ dequantize_static(m).T.astype("f8")
    exact = x.astype("f8") @ w.T.astype("f8")
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def test_smoothing_saves_the_small_channels_from_outliers() -> None:
    x, w, seen, norm = case(60)
    plain = smooth([w], seen, SETTINGS, norm=None, name="q")
    found = smooth([w], seen, SETTINGS, norm=norm, name="q")
    assert plain.alpha == 0 and np.all(plain.scales == 1)
    assert found.alpha > 0
    assert lost(x, w, found) < 0.4 * lost(x, w, plain)
    half = smooth([w], seen, replace(SETTINGS, alphas=(0.5,)), norm=norm, name="q")
    assert lost(x, w, found) <= 1.05 * lost(x, w, half)


def test_the_paper_s_scales_are_used() -> None:
    _, w, seen, norm = case(60)
    found = smooth([w, 3 * w], seen, replace(SETTINGS, alphas=(0.5,)), norm=norm, name="q")
    inputs = np.maximum(np.abs(seen.low), np.abs(seen.high))
    wanted = np.sqrt(inputs / (3 * np.abs(w).max(axis=0)))
    ratio = found.scales / wanted
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)  # the norm is rounded to float16


def test_what_is_folded_into_the_norm_is_exactly_undone() -> None:
    _, _, seen, norm = case(60)
    w = np.ones((4, 96), np.float32)
    norm[3] = 0  # nothing to fold into
    found = smooth([w], seen, SETTINGS, norm=norm, name="q")
    folded = norm / found.scales
    np.testing.assert_allclose(folded.astype(np.float16).astype(np.float32), folded, rtol=2e-7)
    assert found.scales[3] == 1
    np.testing.assert_allclose(folded * found.scales, norm, rtol=2e-7)


def test_the_reported_error_is_that_of_the_sampled_outputs() -> None:
    _, w, seen, norm = case(10)
    found = smooth([w], seen, SETTINGS, norm=norm, name="q")
    assert found.error == pytest.approx(lost(seen.rows, w, found), rel=1e-3)
    assert 0 < found.error < 0.02


def test_clipping_gives_up_one_value_for_all_others() -> None:
    x, w, _, _ = case(1)
    x[0, 0] = 200
    seen = Observed(x.min(axis=0), x.max(axis=0), x[1:200])
    whole = smooth([w], seen, replace(SETTINGS, clips=(1.0,)), norm=None, name="q")
    found = smooth([w], seen, SETTINGS, norm=None, name="q")
    assert found.clip < 1
    assert lost(x[1:], w, found) < lost(x[1:], w, whole)


def test_zero_is_exact_and_codes_are_of_8_bits() -> None:
    values = np.float32([-5, -1, 0, 0.01, 7])
    for scale, zero in ((0.05, 100), (0.1, 0), (0.1, 255)):
        coded = code_inputs(values, scale, zero)
        assert coded[2] == 0
        assert coded.min() >= -zero * scale - 1e-6
        assert coded.max() <= (255 - zero) * scale + 1e-5
    m = static_matrix(
        np.float32([[1, -1, 0.5], [0, 0, 0]]), Smoothed(0, 1, np.ones(3, "f4"), 1, 0, 0)
    )
    assert m.codes.tolist()[0][:2] == [255, 1]
    assert m.codes.tolist()[1] == [128] * 3
    assert np.all(dequantize_static(m)[1] == 0)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    _, w, seen, _ = case(1)
    with pytest.raises(InputRefused, match="'q_proj' or its inputs hold NaN"):
        smooth(
            [w], replace(seen, high=np.full(96, np.inf, "f4")), SETTINGS, norm=None, name="q_proj"
        )
    w[1, 1] = np.nan
    with pytest.raises(InputRefused, match="'q_proj'"):
        smooth([w], seen, SETTINGS, norm=None, name="q_proj")
