"""Pieces that all standard graphs share: norms, activations and attention of primitive operators."""

from __future__ import annotations

import numpy as np

from exporter.graphs.writer import GraphWriter

# What a key that may not be seen adds to its score. Finite: a row without any key stays finite.
HIDDEN = -1e9


class Ops:
    """Adds operators to one graph; values are float32."""

    def __init__(self, writer: GraphWriter) -> None:
        self.writer = writer

    def whole(self, *values: int) -> str:
        """An int64 constant ``[len(values)]``."""
        name = "index/" + ",".join(map(str, values))
        return self.writer.constant(name, np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar."""
        rounded = np.float32(value)
        return self.writer.constant(f"number/{float(rounded)!r}", np.array(rounded))

    def reshape(self, name: str, x: str, *shape: int) -> str:
        """`x` in another shape; -1 and 0 as in ONNX."""
        return self.writer.node("Reshape", name, [x, self.whole(*shape)])

    def transpose(self, name: str, x: str, *order: int) -> str:
        """Axes in another order."""
        return self.writer.node("Transpose", name, [x], attributes={"perm": list(order)})

    def slice(self, name: str, x: str, start: str, *, axis: int) -> str:
        """What lies from `start` (int64 ``[1]``, negative from the end) on."""
        last = self.whole(np.iinfo(np.int64).max)
        return self.writer.node("Slice", name, [x, start, last, self.whole(axis)])

    def rms_norm(self, name: str, x: str, gamma: str, epsilon: float, *, output: str) -> str:
        """RMS norm over the last axis (arXiv 1910.07467), named `output`."""
        node = self.writer.node
        square = node("Mul", f"{name}/square", [x, x])
        mean = node("ReduceMean", f"{name}/mean", [square, self.whole(-1)])
        above = node("Add", f"{name}/above", [mean, self.number(epsilon)])
        root = node("Sqrt", f"{name}/root", [above])
        normed = node("Div", f"{name}/normed", [x, root])
        return node("Mul", name, [normed, gamma], outputs=[output])

    def swish(self, name: str, x: str, alpha: float, *, output: str) -> str:
        """``x * sigmoid(alpha * x)``, named `output`: SiLU for 1."""
        inner = x
        if alpha != 1.0:
            inner = self.writer.node("Mul", f"{name}/inner", [x, self.number(alpha)])
        gate = self.writer.node("Sigmoid", f"{name}/gate", [inner])
        return self.writer.node("Mul", name, [x, gate], outputs=[output])

    def heads(self, name: str, x: str, count: int, width: int) -> str:
        """``[batch, length, count * width]`` as ``[batch, count, length, width]``."""
        split = self.reshape(f"{name}/split", x, 0, -1, count, width)
        return self.transpose(f"{name}/heads", split, 0, 2, 1, 3)

    def attention(
        self, name: str, query: str, key: str, value: str, width: int, mask: str | None = None
    ) -> str:
        """Softmax attention (arXiv 1706.03762) of heads, joined to ``[batch, length, width]``.

        query ``[batch, heads, length, head_dim]``, already scaled; key and value of as many heads;
        mask, added to the scores: ``[batch, 1, length, total]``.
        """
        node = self.writer.node
        turned = self.transpose(f"{name}/keys", key, 0, 1, 3, 2)
        scores = node("MatMul", f"{name}/scores", [query, turned])
        if mask is not None:
            scores = node("Add", f"{name}/masked", [scores, mask])
        shares = node("Softmax", f"{name}/shares", [scores], attributes={"axis": -1})
        mixed = node("MatMul", f"{name}/mixed", [shares, value])
        return self.reshape(name, self.transpose(f"{name}/places", mixed, 0, 2, 1, 3), 0, 0, width)
