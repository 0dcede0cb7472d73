"""Products in 8 bits against integer arithmetic in numpy, and the graphs that they are chosen by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.static8 import StaticMatrix, dequantize_static
from exporter.graphs.linear import linear
from exporter.graphs.matrices import GatedMatrix, Matrix, WatchedMatrix, stack_rows
from exporter.graphs.static import STRIDE, gate_input, watch_output
from exporter.graphs.writer import GraphWriter
from exporter.runtimes.ort_session import open_session

Array = NDArray[np.float32]


def matrix(rows: int, columns: int, seed: int = 0, *, extreme: bool = False) -> StaticMatrix:
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 256, (rows, columns)).astype(np.uint8)
    if extreme:
        codes[:] = np.where(codes > 128, 255, 1)
    scales = rng.uniform(0.001, 0.02, rows).astype(np.float32)
    return StaticMatrix(codes, scales, 0.03, 100)


def by_integers(x: Array, m: StaticMatrix) -> NDArray[np.float64]:
    codes = np.clip(np.rint(x / np.float32(m.input_scale)) + m.input_zero, 0, 255).astype(np.int64)
    product = (codes - m.input_zero) @ (m.codes.astype(np.int64) - 128).T
    return product * m.input_scale * m.scales.astype("f8")


def run(folder: Path, m: Matrix, columns: int, feeds: dict[str, Array]) -> dict[str, Array]:
    with GraphWriter(folder, "one") as writer:
        x = writer.input("x", TensorProto.FLOAT, ["batch", "length", columns])
        out = writer.output("y", TensorProto.FLOAT, ["batch", "length", "rows"])
        linear(writer, "linear", x, m, 0, output=out)
        writer.finish()
    session = open_session(folder / "one.onnx", 1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("length", [1, 3, 65])
@pytest.mark.parametrize("columns", [16, 100, 768])
@pytest.mark.parametrize("extreme", [False, True])
def test_no_kernel_saturates(tmp_path: Path, length: int, columns: int, extreme: bool) -> None:
    m = matrix(40, columns, extreme=extreme)
    x = np.random.default_rng(1).uniform(-3, 4.6, (2, length, columns)).astype(np.float32)
    if extreme:  # the largest sums there are: signed weights would exceed 16 bits here
        x = np.where(x > 0, np.float32(9), np.float32(-9))

    y = run(tmp_path, m, columns, {"x": x})["y"]

    expected = by_integers(x, m)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_watched_matrices_show_what_they_are_multiplied_with(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((24, 20), np.float32)
    x = rng.standard_normal((2, 40, 20)).astype(np.float32)

    found = run(tmp_path, WatchedMatrix(("a", "b"), w), 20, {"x": x})

    flat = x.reshape(-1, 20)
    np.testing.assert_allclose(found["y"], x @ w.T, atol=1e-5)
    for name in ("a", "b"):
        assert np.array_equal(found[watch_output(name, "low")], flat.min(axis=0))
        assert np.array_equal(found[watch_output(name, "high")], flat.max(axis=0))
        assert np.array_equal(found[watch_output(name, "rows")], flat[::STRIDE])


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_gate_takes_the_float_or_the_8_bit_product(tmp_path: Path, gate: float) -> None:
    m, w = matrix(24, 20), np.random.default_rng(3).standard_normal((24, 20), np.float32)
    x = np.random.default_rng(4).standard_normal((1, 9, 20)).astype(np.float32)
    feeds = {"x": x, gate_input("a"): np.full(1, gate, np.float32)}

    y = run(tmp_path, GatedMatrix(("a",), w, m), 20, feeds)["y"]

    np.testing.assert_allclose(y, by_integers(x, m) if gate else x @ w.T, atol=1e-5)


def test_stacked_matrices_keep_their_rows() -> None:
    a, b = matrix(8, 16), matrix(4, 16, seed=1)
    both = stack_rows([a, b])
    assert isinstance(both, StaticMatrix)
    expected = np.concatenate([dequantize_static(a), dequantize_static(b)])
    assert np.array_equal(dequantize_static(both), expected)
    w = np.ones((8, 16), np.float32)
    watched = stack_rows([WatchedMatrix(("a",), w), WatchedMatrix(("b",), w[:4])])
    assert isinstance(watched, WatchedMatrix)
    assert (watched.names, watched.values.shape) == (("a", "b"), (12, 16))
    gated = stack_rows([GatedMatrix(("a",), w, a), GatedMatrix(("b",), w[:4], b)])
    assert isinstance(gated, GatedMatrix)
    assert np.array_equal(gated.static.codes, both.codes)
    other = StaticMatrix(b.codes, b.scales, b.input_scale, 7)
    for parts in ([a, other], [a, w], [WatchedMatrix(("a",), w), w]):
        with pytest.raises(ValueError, match="cannot be stacked"):
            stack_rows(parts)
