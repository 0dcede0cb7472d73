"""NF4 against the paper's construction, and against bitsandbytes where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core.nf4 import NF4_VALUES, dequantize_nf4, nf4_shapes, quantize_nf4


def test_the_values_are_the_papers() -> None:
    """QLoRA, appendix E: quantiles of a normal from both sides of an offset, scaled to 1."""
    from statistics import NormalDist

    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    assert np.allclose(NF4_VALUES, expected, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from((16, 64, 128)), st.integers(0, 999))
def test_every_value_goes_to_the_nearest(rows: int, columns: int, block: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    matrix = quantize_nf4(weight, block)
    assert (len(matrix.data), len(matrix.absmax)) == nf4_shapes(rows, columns, block)
    found = dequantize_nf4(matrix).reshape(-1)
    for start in range(0, weight.size, block):
        part = weight.reshape(-1)[start : start + block].astype(np.float64)
        tried = NF4_VALUES.astype(np.float64)[None] * np.abs(part).max()
        best = np.abs(part[:, None] - tried).min(axis=1)
        error = np.abs(part - found[start : start + block])
        assert np.all(error <= best + 1e-6 * np.abs(part).max())


def test_the_first_value_is_in_the_high_half() -> None:
    matrix = quantize_nf4(np.array([[1.0, -1.0, 0.0]], np.float32))
    assert matrix.data.tolist() == [0xF0, 0x77]
    assert dequantize_nf4(matrix).tolist() == [[1.0, -1.0, 0.0]]


def test_zeros_stay_zeros_and_nan_is_refused() -> None:
    assert not dequantize_nf4(quantize_nf4(np.zeros((2, 64), np.float32))).any()
    with pytest.raises(ValueError, match="NaN"):
        quantize_nf4(np.full((1, 64), np.nan, np.float32))


@pytest.mark.parametrize("shape", [(3, 64), (16, 96), (5, 7)])
def test_bitsandbytes_has_the_same_bytes(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import torch

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(weight.numpy())
    assert np.array_equal(packed.numpy().reshape(-1), ours.data)
    assert np.array_equal(state.absmax.numpy(), ours.absmax)
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert np.array_equal(theirs.numpy(), dequantize_nf4(ours))
