"""Rotations and masks of the standard dialect by their definitions, far out and with padding anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from exporter.graphs.attention import attention
from exporter.graphs.rotary import AxisRotary, section_frequencies
from exporter.graphs.standard.lowering import Standard
from exporter.graphs.writer import GraphWriter
from exporter.runtimes.ort_session import open_session

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
SECTIONS, HEADS, WIDTH, THETA = (2, 3, 3), 3, 16, 1e6


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """M-RoPE of heads [length, heads, width] at positions [length, axes], in float64."""
    inverse = 1 / THETA ** (np.arange(0, WIDTH, 2) / WIDTH)
    owner = np.repeat(np.arange(len(SECTIONS)), SECTIONS)
    angles = positions[:, owner] * inverse
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = np.split(x.astype("f8"), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("far", [0, 2048, 30000])
def test_mrope_is_exact_far_out(far: int, tmp_path: Path) -> None:
    with GraphWriter(tmp_path, "g", dialect=Standard) as writer:
        places = writer.input("places", INT64, ["rows", len(SECTIONS)])
        x = writer.input("x", FLOAT, [1, "rows", HEADS * WIDTH])
        out = writer.output("y", FLOAT, [1, "rows", HEADS * WIDTH])
        rotary = AxisRotary(writer, places, section_frequencies(WIDTH, THETA, SECTIONS))
        writer.node("Identity", "y", [rotary.turn("turned", x, "", HEADS)], outputs=[out])
        writer.finish()
    rng = np.random.default_rng(far)
    positions = far + rng.integers(0, 40, (9, len(SECTIONS)))
    x_values = rng.standard_normal((1, 9, HEADS * WIDTH)).astype(np.float32)
    expected = rotated(x_values.reshape(9, HEADS, WIDTH), positions).reshape(1, 9, -1)
    feed = {"places": positions, "x": x_values}
    # Float32 angles: half a unit in the last place of 30000 is 1e-3.
    limit = 1e-6 + 4 * far * 2.0**-24
    for run in (
        open_session(tmp_path / "g.onnx", 1).run,
        ReferenceEvaluator(str(tmp_path / "g.onnx")).run,
    ):
        assert np.abs(run(None, feed)[0] - expected).max() < limit


def test_keys_beyond_their_length_are_not_seen(tmp_path: Path) -> None:
    with GraphWriter(tmp_path, "g", dialect=Standard) as writer:
        shape: list[int | str] = ["batch", "keys", HEADS * WIDTH]
        parts = [writer.input(name, FLOAT, shape) for name in "qkv"]
        lengths = writer.input("lengths", INT32, ["batch"])
        out = writer.output("y", FLOAT, shape)
        made = attention(writer, "seen", [*parts, "", lengths], HEADS, WIDTH)
        writer.node("Identity", "y", [made], outputs=[out])
        writer.finish()
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal((3, 5, HEADS * WIDTH)).astype(np.float32) for n in "qkv"}
    counts = np.array([1, 5, 3], np.int32)
    found = open_session(tmp_path / "g.onnx", 1).run(None, {**values, "lengths": counts})[0]
    for row, count in enumerate(counts):
        q, k, v = (values[n][row].reshape(5, HEADS, WIDTH).astype("f8") for n in "qkv")
        scores = np.einsum("ihd,jhd->hij", q, k[:count]) / np.sqrt(WIDTH)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        expected = np.einsum("hij,jhd->ihd", shares, v[:count]).reshape(5, -1)
        assert np.abs(found[row] - expected).max() < 1e-6
