"""Symmetric blocks with positive scales alone: what TensorRT's 4-bit blocks can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import MedexportError, WrongUsage
from exporter.quantizers.awq import clip_matrix
from exporter.quantizers.gptq import gptq_matrix
from exporter.quantizers.guards import guard
from exporter.quantizers.hqq import hqq_matrix
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.schemes import find_scheme, for_dialect, variant_name
from exporter.quantizers.settings import method_settings
from tests.unit.quantizers.correlated import inputs, lost, statistics, weights

Array = NDArray[np.float32]
POSITIVE = BlockFormat(4, 64, symmetric=True, positive=True)
BOTH = BlockFormat(4, 64, symmetric=True)
X = inputs(192, 800)


def skewed(seed: int, *, columns: int = 192) -> Array:
    """Rows whose larger values lie on one side: upwards in the even ones, down in the odd ones."""
    rng = np.random.default_rng(seed)
    w = rng.gamma(0.5, 0.02, (24, columns)) - 0.005
    w[1::2] *= -1
    return w.astype(np.float32)


def absmax_error(w: Array, block: int) -> NDArray[np.float64]:
    """Squared error of each block with the scale |w|max / 7 in float16, by its definition."""
    blocks = w.reshape(w.shape[0], -1, block).astype("f8")
    scale = np.abs(blocks).max(-1, keepdims=True) / 7
    kept = scale.astype(np.float16).astype("f8")
    codes = np.clip(np.rint(np.divide(blocks, kept, where=kept > 0, out=blocks * 0)), -8, 7)
    found: NDArray[np.float64] = np.square(codes * kept - blocks).sum(-1)
    return found


def block_error(w: Array, packed: PackedMatrix) -> NDArray[np.float64]:
    lost = np.square(dequantize(packed).astype("f8") - w)
    found: NDArray[np.float64] = lost.reshape(w.shape[0], -1, packed.format.block).sum(-1)
    return found


METHODS: dict[str, Callable[[Array, BlockFormat], PackedMatrix]] = {
    "rtn": lambda w, fmt: quantize_matrix(w, fmt, search=False),
    "rtn-mse": lambda w, fmt: quantize_matrix(w, fmt, search=True),
    "hqq": hqq_matrix,
    "gptq": lambda w, fmt: gptq_matrix(w, fmt, statistics(X)).packed,
    "awq": lambda w, fmt: clip_matrix(w, fmt, statistics(X)),
}


@given(
    seed=st.integers(0, 10**6),
    block=st.sampled_from([32, 64, 128]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    tail=st.sampled_from([1, 3, 30]),
    shift=st.floats(-3, 3),
)
@settings(max_examples=60, deadline=None)
def test_no_scale_below_zero_and_no_block_worse_than_absmax_rounding(
    seed: int, block: int, size: float, tail: int, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    w = ((np.clip(rng.standard_t(tail, (6, 256)), -50, 50) + shift) * size).astype(np.float32)
    w[rng.integers(0, 6)] = 0
    packed = quantize_matrix(w, replace(POSITIVE, block=block), search=True)
    assert np.all(packed.scales >= 0)
    assert np.all(block_error(w, packed) <= absmax_error(w, block) * (1 + 1e-5) + 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_positive_scales(method: str) -> None:
    for w in (skewed(1), weights(24, 192)):
        packed = METHODS[method](w, POSITIVE)
        assert np.all(packed.scales >= 0)
        assert np.array_equal(packed.scales, METHODS[method](w, POSITIVE).scales)
    if method != "rtn":
        assert np.any(METHODS[method](skewed(1), BOTH).scales < 0)


@pytest.mark.parametrize("method", ["rtn-mse", "hqq", "gptq", "awq"])
def test_searched_scales_lose_less_than_absmax_rounding(method: str) -> None:
    for w in (skewed(2), weights(24, 192)):
        packed = METHODS[method](w, POSITIVE)
        # Absmax rounding by its definition, for the methods that look at outputs and errors to the 0.7.
        blocks = w.reshape(24, -1, 64)
        scale = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
        plain = (np.rint(blocks / scale) * scale).reshape(w.shape)
        if method in ("gptq", "awq"):
            assert lost(w, dequantize(packed), X) < 0.95 * lost(w, plain, X)
        elif method == "hqq":
            ours, theirs = (np.abs(v - w) ** 0.7 for v in (dequantize(packed), plain))
            # In sum: the range's own plain grid is among its candidates, absmax / 7 is not.
            assert ours.sum() < 0.99 * theirs.sum()
        else:
            assert np.all(block_error(w, packed) <= absmax_error(w, 64) * (1 + 1e-5))


def test_a_negative_scale_of_a_quantizer_is_a_fault() -> None:
    packed = quantize_matrix(skewed(3), BOTH, search=True)
    guard(packed, np.ones(192), of="weights", name="up")
    with pytest.raises(MedexportError, match="'up': .* negative"):
        guard(replace(packed, format=POSITIVE), np.ones(192), of="weights", name="up")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int4-gptq-sym", "int4-gptq-pos"),
        ("int4-hqq-g128-sym", "int4-hqq-g128-pos"),
        ("int4-rtn-small-sym", "int4-rtn-small-pos"),
        ("mixed-sym", "mixed-pos"),
        ("int4-awq-pos", "int4-awq-pos"),
        ("int8", "int8"),
        ("fp16", "fp16"),
        ("bnb-int8", "bnb-int8"),
    ],
)
def test_a_scheme_for_the_standard_dialect(name: str, expected: str) -> None:
    scheme = for_dialect(find_scheme(name), "standard")
    assert scheme.name == expected
    assert find_scheme(expected) == scheme
    assert for_dialect(find_scheme(name), "ort") == find_scheme(name)
    four = [f for f in (*scheme.formats.values(), *scheme.choices) if f and f.bits == 4]
    assert all(f.symmetric and f.positive for f in four)
    assert scheme.positive == expected.endswith("-pos")
    assert ("scales" in method_settings(scheme)) == scheme.positive
    if scheme.positive:
        assert method_settings(scheme)["scales"] == {"positive": True}
        assert variant_name(expected, None, False) == expected.replace("-pos", "-asym")


@pytest.mark.parametrize("name", ["int4-gptq", "mixed-g128", "int4-rtn-small"])
def test_asymmetric_blocks_are_the_users_to_change(name: str) -> None:
    with pytest.raises(WrongUsage, match="asymmetric blocks .*: add --symmetric") as caught:
        for_dialect(find_scheme(name), "standard")
    assert "\n" not in str(caught.value)
