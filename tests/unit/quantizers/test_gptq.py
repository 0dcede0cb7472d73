from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, dequantize, unpack
from exporter.core.errors import InputRefused
from exporter.quantizers import gptq, hessian
from exporter.quantizers.gptq import Clip, GptqSettings, gptq_matrix
from exporter.quantizers.hessian import Order, column_order, factorize
from exporter.quantizers.rtn import quantize_matrix
from tests.unit.quantizers.correlated import inputs, lost, statistics, weights

FORMATS = [
    BlockFormat(bits, block, symmetric)
    for bits in (4, 8)
    for block in (16, 32, 64)
    for symmetric in (False, True)
]
PLAIN = GptqSettings(order="none", clip="none", sweeps=0)


def with_moment(moment: NDArray[np.float32]) -> InputStatistics:
    return replace(statistics(inputs(moment.shape[0], 32)), second_moment=moment)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("order", ["none", "within", "groups"])
def test_uncorrelated_inputs_give_round_to_nearest(fmt: BlockFormat, order: Order) -> None:
    w = weights(24, 100)  # 100 columns leave a short last block
    settings = GptqSettings(order=order, clip="plain", sweeps=0)

    done = gptq_matrix(w, fmt, with_moment(np.eye(100, dtype=np.float32)), settings)

    expected = quantize_matrix(w, fmt, search=True)
    assert np.array_equal(done.packed.scales, expected.scales)
    assert np.array_equal(done.packed.qdata, expected.qdata)
    if expected.zero_points is not None:
        assert np.array_equal(done.packed.zero_points, expected.zero_points)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("seed", [1, 2])
def test_outputs_are_never_worse_than_with_round_to_nearest(
    fmt: BlockFormat, sweeps: int, seed: int
) -> None:
    x, w = inputs(144, 600, seed), weights(40, 144, seed)

    done = gptq_matrix(w, fmt, statistics(x), GptqSettings(sweeps=sweeps))

    nearest = min(lost(w, dequantize(quantize_matrix(w, fmt, search=s)), x) for s in (False, True))
    assert lost(w, dequantize(done.packed), x) < nearest


def textbook(
    w: NDArray[np.float32], moment: NDArray[np.float32], fmt: BlockFormat, order: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """GPTQ as the optimal brain surgeon: explicit inverse, one row of it eliminated per column."""
    h = moment.astype("f8")
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    inverse, left = np.linalg.inv(h), w.astype("f8")
    codes = np.zeros_like(left)
    blocks = w.shape[1] // fmt.block
    scales, zeros = np.zeros((len(w), blocks)), np.zeros((len(w), blocks))
    seen: set[int] = set()
    for j in order:
        b = int(j) // fmt.block
        if b not in seen:
            seen.add(b)
            part = left[:, b * fmt.block : (b + 1) * fmt.block]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            if fmt.symmetric:
                scale = np.maximum(low / -fmt.middle, high / (fmt.middle - 1))
                zeros[:, b] = fmt.middle
            else:
                scale = (high - low) / fmt.top
                zeros[:, b] = np.rint(-low / scale.astype(np.float16))
            scales[:, b] = scale.astype(np.float16)
        codes[:, j] = np.clip(np.rint(left[:, j] / scales[:, b]) + zeros[:, b], 0, fmt.top)
        error = (left[:, j] - (codes[:, j] - zeros[:, b]) * scales[:, b]) / inverse[j, j]
        left = left - np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # its row and column are zero now
    return codes, scales, zeros


@pytest.mark.parametrize("fmt", [BlockFormat(4, 32, False), BlockFormat(4, 16, True)])
@pytest.mark.parametrize("order", ["none", "within", "groups"])
@pytest.mark.parametrize("columns", [32, 128])
def test_codes_are_those_of_the_textbook(fmt: BlockFormat, order: Order, columns: int) -> None:
    w, stats = weights(20, 96), statistics(inputs(96, 400))
    settings = replace(PLAIN, order=order, columns=columns)

    packed = gptq_matrix(w, fmt, stats, settings).packed

    sequence, _ = column_order(stats.second_moment.diagonal(), fmt.block, order)
    codes, scales, zeros = textbook(w, stats.second_moment, fmt, sequence)
    assert np.array_equal(packed.scales.astype("f8"), scales)
    assert np.array_equal(unpack(packed.qdata, 4, fmt.block).reshape(20, 96), codes)
    if packed.zero_points is not None:
        assert np.array_equal(unpack(packed.zero_points, 4, 96 // fmt.block), zeros)


@pytest.mark.parametrize("clip", ["none", "plain", "hessian", "factor"])
@pytest.mark.parametrize("fmt", [BlockFormat(4, 32, False), BlockFormat(8, 64, True)])
def test_what_is_stored_is_what_was_worked_with(
    clip: Clip, fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, stats, kept = weights(30, 100), statistics(inputs(100, 300)), []
    store = gptq._store

    def spy(done: gptq.Rounded, *rest: object) -> None:
        kept.append(done)
        store(done, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gptq, "_store", spy)
    monkeypatch.setattr(gptq, "ROWS", 13)

    packed = gptq_matrix(w, fmt, stats, GptqSettings(clip=clip, sweeps=2)).packed

    order, _ = column_order(stats.second_moment.diagonal(), fmt.block, "groups")
    values = np.concatenate([done.values.T for done in kept])
    assert np.array_equal(dequantize(packed)[:, order], values)


def test_each_sweep_lowers_the_error() -> None:
    x, w, fmt = inputs(128, 500), weights(64, 128), BlockFormat(4, 32, False)

    losses = [
        lost(w, dequantize(gptq_matrix(w, fmt, statistics(x), GptqSettings(sweeps=n)).packed), x)
        for n in (0, 1, 2, 4)
    ]

    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.97 * losses[0]


def test_blocks_of_columns_change_nothing_but_rounding() -> None:
    w, stats, fmt = weights(64, 256), statistics(inputs(256, 900)), BlockFormat(4, 32, False)

    found = [
        gptq_matrix(w, fmt, stats, GptqSettings(columns=n)).packed.qdata for n in (32, 128, 4096)
    ]

    for other in found[1:]:
        assert np.mean(found[0] != other) < 0.002


@pytest.mark.parametrize("kind", ["rank one", "few tokens", "duplicates"])
def test_a_singular_hessian_is_damped_until_it_works(kind: str) -> None:
    x = inputs(96, 400)
    if kind == "rank one":
        x = x[:1]
    elif kind == "few tokens":
        x = x[:20]
    else:
        x[:, 48:] = x[:, :48]
    w, fmt = weights(16, 96), BlockFormat(4, 32, False)

    done = gptq_matrix(w, fmt, statistics(x), GptqSettings(damping=0.0))

    assert done.raised > 0
    assert done.damping > 0
    assert lost(w, dequantize(done.packed), x) < 1e-3


def test_inputs_that_are_never_used_are_counted_and_rounded_to_nearest() -> None:
    x, w, fmt = inputs(96, 400), weights(16, 96), BlockFormat(4, 32, False)
    x[:, 32:64] = 0

    done = gptq_matrix(w, fmt, statistics(x), GptqSettings(order="none", clip="plain", sweeps=0))

    assert done.dead == 32
    nearest = dequantize(quantize_matrix(w, fmt, search=True))
    assert np.array_equal(dequantize(done.packed)[:, 32:64], nearest[:, 32:64])


def test_no_inputs_at_all_give_round_to_nearest() -> None:
    w, fmt = weights(16, 96), BlockFormat(4, 32, False)

    done = gptq_matrix(
        w,
        fmt,
        with_moment(np.zeros((96, 96), np.float32)),
        GptqSettings(clip="plain", sweeps=0),
    )

    assert np.array_equal(done.packed.qdata, quantize_matrix(w, fmt, search=True).qdata)
    assert done.dead == 96


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_statistics_are_refused_by_name(value: float) -> None:
    moment = statistics(inputs(64, 200)).second_moment
    moment[5, 5] = value
    with pytest.raises(InputRefused, match="'q_proj'"):
        gptq_matrix(weights(8, 64), BlockFormat(4, 32, False), with_moment(moment), name="q_proj")


def test_statistics_of_another_width_and_bad_weights_are_refused() -> None:
    w, fmt = weights(8, 64), BlockFormat(4, 32, False)
    with pytest.raises(InputRefused, match=r"second moment \[96, 96\]; expected \[64, 64\]"):
        gptq_matrix(w, fmt, statistics(inputs(96, 200)))
    w[3, 40] = np.nan
    with pytest.raises(InputRefused, match="'down' holds NaN"):
        gptq_matrix(w, fmt, statistics(inputs(64, 200)), name="down")


SCRIPT = """
import hashlib
from exporter.core.blocks import BlockFormat
from exporter.quantizers.gptq import gptq_matrix
from tests.unit.quantizers.correlated import inputs, statistics, weights
m = gptq_matrix(weights(300, 640), BlockFormat(4, 64, False), statistics(inputs(640, 900))).packed
print(hashlib.sha256(m.qdata.tobytes() + m.scales.tobytes()).hexdigest())
"""


def test_bytes_do_not_depend_on_threads() -> None:
    root = Path(__file__).parents[3]
    found = set()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=root,
            env=environment | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == 64


@pytest.mark.parametrize("order", ["none", "within", "groups"])
def test_the_order_keeps_blocks_together(order: Order) -> None:
    diagonal = np.random.default_rng(3).exponential(size=100).astype(np.float32)

    columns, groups = column_order(diagonal, 32, order)

    assert sorted(columns) == list(range(100))
    assert [len({int(c) // 32 for c in columns[g]}) for g in groups] == [1, 1, 1, 1]
    if order != "none":
        assert all(np.all(np.diff(diagonal[columns[g]]) <= 0) for g in groups)
    if order == "groups":
        means = [diagonal[columns[g]].mean() for g in groups]
        assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("double", [0, 8192])
def test_the_factor_multiplies_back_to_the_hessian(
    double: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian, "DOUBLE", double)
    monkeypatch.setattr(hessian, "PANEL", 24)
    moment = statistics(inputs(100, 400)).second_moment

    factor = factorize(moment, 32, 0.01, "groups")

    everything = slice(0, 100)
    upper = np.triu(factor.feedback(everything, everything).astype("f8")) * factor.diagonal
    expected = moment[factor.order][:, factor.order] + factor.damping * np.eye(100)
    np.testing.assert_allclose(upper @ upper.T, expected, atol=2e-5 * expected.max())


def test_memory_is_bounded_by_two_copies_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "DOUBLE", 0)  # as for the widths at which it matters
    w, stats = weights(16, 1536), statistics(inputs(1536, 400))
    copy = stats.second_moment.nbytes

    tracemalloc.start()
    gptq_matrix(w, BlockFormat(4, 64, False), stats)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2 * copy  # besides the one that was given
