"""The writer refuses graphs that would only fail, or be wrong, in the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from exporter.graphs.writer import GraphWriter

FLOAT = TensorProto.FLOAT


def start(folder: Path) -> GraphWriter:
    graph = GraphWriter(folder, "g")
    graph.input("x", FLOAT, ["n", 4])
    graph.output("y", FLOAT, ["n", 4])
    return graph


def test_unknown_input(tmp_path: Path) -> None:
    graph = start(tmp_path)
    graph.node("Neg", "a", ["z"], outputs=["y"])
    with pytest.raises(ValueError, match="unknown inputs"):
        graph.finish()


def test_value_made_twice(tmp_path: Path) -> None:
    graph = start(tmp_path)
    graph.node("Neg", "a", ["x"], outputs=["y"])
    graph.node("Abs", "b", ["x"], outputs=["y"])
    with pytest.raises(ValueError, match="repeated outputs"):
        graph.finish()


def test_weight_that_nothing_uses(tmp_path: Path) -> None:
    graph = start(tmp_path)
    graph.weight("w", np.zeros((40, 40), np.float32))
    graph.node("Neg", "a", ["x"], outputs=["y"])
    with pytest.raises(ValueError, match="never used"):
        graph.finish()


def test_output_that_nothing_makes(tmp_path: Path) -> None:
    graph = start(tmp_path)
    graph.node("Neg", "a", ["x"])
    with pytest.raises(ValueError, match="nothing computes"):
        graph.finish()


def test_weight_written_twice_and_constant_changed(tmp_path: Path) -> None:
    graph = start(tmp_path)
    graph.weight("w", np.zeros((40, 40), np.float32))
    with pytest.raises(ValueError, match="written twice"):
        graph.weight("w", np.zeros((40, 40), np.float32))
    graph.constant("c", np.array([1]))
    assert graph.constant("c", np.array([1])) == "c"
    with pytest.raises(ValueError, match="different values"):
        graph.constant("c", np.array([2]))


def test_a_failed_block_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with start(tmp_path) as graph:
            graph.weight("w", np.zeros((40, 40), np.float32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_bytes_depend_only_on_the_calls(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with start(tmp_path / name) as graph:
            graph.weight("w", np.eye(4, 400, dtype=np.float32))
            graph.node("Sum", "s", ["x", "w"], outputs=["y"])
            written = graph.finish()
    first, second = (tmp_path / n / "g.onnx" for n in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert (written.weight_bytes, written.data_bytes, written.nodes) == (6400, 0, 1)
