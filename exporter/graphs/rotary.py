"""Rotary positions in a graph: tables for the attention op, or angles of several axes.

Both round where transformers rounds: frequencies and angles are float32, or positions far out would
turn by other angles than the model was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.graphs.writer import MICROSOFT, GraphWriter


def frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """Radians per position ``[head_dim / 2]`` (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    inverse: NDArray[np.float32] = np.float32(1) / powers
    return inverse


def rotary_tables(
    positions: int, head_dim: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines ``[positions, head_dim / 2]``, float32."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies(head_dim, theta)
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


def section_frequencies(
    head_dim: int, theta: float, sections: Sequence[int]
) -> NDArray[np.float32]:
    """Radians per position on each axis, ``[axes, head_dim / 2]``: each angle follows one axis
    (M-RoPE, arXiv 2409.12191).
    """
    owner = np.repeat(np.arange(len(sections)), sections)
    axes = np.arange(len(sections))[:, None] == owner
    return np.where(axes, frequencies(head_dim, theta), np.float32(0))


class AxisRotary:
    """Rotates by positions on several axes, int64 ``[rows, axes]``.

    Each column of `table` ``[axes, head_dim / 2]`` has one number that is not zero, so that the
    product with the positions is exactly position times frequency. Cosines and sines come once per
    run as ``[rows, head_dim / 2]``; no table of all positions is stored. `name`: of its nodes, where a
    graph has several.
    """

    def __init__(
        self, writer: GraphWriter, positions: str, table: NDArray[np.float32], name: str = "rotary"
    ) -> None:
        self._writer, self._half = writer, table.shape[1]
        cast = {"to": TensorProto.FLOAT}
        floats = writer.node("Cast", f"{name}.positions", [positions], attributes=cast)
        radians = writer.constant(f"{name}.frequencies", table)
        if writer.dialect is None:
            angles = writer.node("MatMul", f"{name}.angles", [floats, radians])
        else:
            angles = writer.dialect.angles(f"{name}.angles", floats, radians)
        self._cos = writer.node("Cos", f"{name}.cos", [angles])
        self._sin = writer.node("Sin", f"{name}.sin", [angles])

    def turn(self, name: str, x: str, rows: str, heads: int) -> str:
        """Heads ``[batch, length, heads * head_dim]`` rotated; `rows` int64 ``[batch, length]`` says which
        row of the positions each place has (or ``[1]``: the first of consecutive ones, at batch 1).
        A dialect has positions of the same leading axes as `x` instead, and no `rows`.
        """
        if self._writer.dialect is not None:
            turns, width = (self._cos, self._sin), 2 * self._half
            return self._writer.dialect.turned(name, x, turns, heads, (width, width))
        inputs = [x, rows, self._cos, self._sin]
        return self._writer.node(
            "RotaryEmbedding",
            name,
            inputs,
            domain=MICROSOFT,
            attributes={"interleaved": 0},
        )
