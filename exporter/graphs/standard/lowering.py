"""The standard dialect: what onnxruntime's own operators do, in those of ai.onnx.

RMS norm and rotary positions are primitive operators: RMSNormalization and RotaryEmbedding need
opset 23, which parsers before TensorRT 10.15 do not take.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix
from exporter.core.errors import InputRefused
from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.dialect import Attributes, TextOps
from exporter.graphs.matrices import Matrix
from exporter.graphs.standard.linear import Weights
from exporter.graphs.standard.ops import HIDDEN, Ops
from exporter.graphs.standard.texts import Concatenated
from exporter.graphs.writer import GraphWriter

# Gelu of ai.onnx: by the error function, or its approximation by tanh (arXiv 1606.08415).
GELU_FORMS = {"BiasGelu": "none", "FastGelu": "tanh"}
RMS_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


class Standard:
    """`graphs.dialect.Dialect` of ai.onnx alone, for one graph; `half` as in `standard.linear.Weights`."""

    def __init__(self, writer: GraphWriter, *, half: bool = False) -> None:
        self.writer = writer
        self.ops = Ops(writer)
        self.weights = Weights(writer, half=half)
        self.widened = self.weights.widened
        self._columns: dict[str, str] = {}
        self._rows: dict[tuple[str, str], str] = {}
        self._masks: dict[str, str] = {}

    def lowered(
        self, op: str, name: str, inputs: Sequence[str], outputs: list[str], attributes: Attributes
    ) -> None:
        """The nodes that do what `op` does. Raises `InputRefused` for one that is not known here."""
        if op in GELU_FORMS:
            x = inputs[0]
            if len(inputs) > 1:
                x = self.writer.node("Add", f"{name}/bias", inputs)
            form = {"approximate": GELU_FORMS[op]}
            self.writer.node("Gelu", name, [x], outputs=outputs, attributes=form)
        elif op == "QuickGelu":
            alpha = _number(attributes, "alpha")
            self.ops.swish(name, inputs[0], alpha, output=outputs[0])
        elif op in (*RMS_NORMS, "SkipLayerNormalization"):
            self._norm(op, name, inputs, outputs, _number(attributes, "epsilon"))
        else:
            raise InputRefused(
                f"node '{name}' is onnxruntime's own {op}, which the standard dialect cannot say; "
                "export with --dialect ort"
            )

    def product(self, name: str, x: str, matrix: Matrix, output: str | None) -> str:
        """``x @ matrix.T``, named `output` where that is given. Raises `InputRefused`."""
        return self.weights.product(name, x, matrix, output=output)

    def rows(self, table: PackedMatrix, ids: str, out: str) -> str:
        """Rows `ids` of a packed table as the value `out`. Raises `InputRefused`."""
        # Before the lookup: TensorRT's Gather takes no 8-bit rows.
        values = self.weights.dequantized("embedding", table, turned=False)
        return self.writer.node("Gather", "gather", [values, ids], outputs=[out])

    def attention(self, name: str, inputs: Sequence[str], heads: int, head_dim: int) -> str:
        """Attention without a past; `inputs` as `graphs.attention.attention` has them."""
        given = [*inputs, *[""] * (6 - len(inputs))]
        parts, biases, lengths, added = given[:3], given[3], given[4], given[5]
        if biases:
            thirds, cut = {"axis": 0, "num_outputs": 3}, [f"{name}.{p}_bias" for p in "qkv"]
            self.writer.node("Split", f"{name}.biases", [biases], outputs=cut, attributes=thirds)
            parts = [
                self.writer.node("Add", f"{name}.{part}/biased", [x, bias])
                for part, x, bias in zip("qkv", parts, cut, strict=True)
            ]
        query, key, value = (
            x if len(self.writer.shape(x) or ()) == 4 else self._heads(name, p, x, heads, head_dim)
            for p, x in zip("qkv", parts, strict=True)
        )
        scale = self.ops.number(head_dim**-0.5)
        query = self.writer.node("Mul", f"{name}.q/scaled", [query, scale])
        if lengths:
            added = self._length_mask(lengths, parts[1])
        return self.ops.attention(name, query, key, value, heads * head_dim, added or None)

    def turned(
        self, name: str, x: str, turns: Sequence[str], heads: int, sizes: tuple[int, int]
    ) -> str:
        """Heads ``[batch, length, heads * head_dim]`` turned (RoFormer, arXiv 2104.09864), halves of the
        first ``sizes[1]`` values of each against each other.
        """
        (width, rotary), node = sizes, self.writer.node
        split = self.ops.reshape(f"{name}/split", x, 0, 0, heads, width)
        parts = [f"{name}:first", f"{name}:second", f"{name}:rest"][: 2 if rotary == width else 3]
        lengths = [rotary // 2, rotary // 2, width - rotary][: len(parts)]
        ends = [split, self.ops.whole(*lengths)]
        node("Split", f"{name}/parts", ends, outputs=parts, attributes={"axis": -1})
        both = [(n, self._column(turn)) for n, turn in zip(("cos", "sin"), turns, strict=True)]
        # first * cos - second * sin, then second * cos + first * sin
        across, along = (node("Mul", f"{name}/first_{n}", [parts[0], t]) for n, t in both)
        back, down = (node("Mul", f"{name}/second_{n}", [parts[1], t]) for n, t in both)
        left = node("Sub", f"{name}/left", [across, down])
        right = node("Add", f"{name}/right", [back, along])
        joined = node("Concat", name, [left, right, *parts[2:]], attributes={"axis": -1})
        return self.ops.reshape(f"{name}/joined", joined, 0, 0, heads * width)

    def angles(self, name: str, positions: str, radians: str) -> str:
        """``positions @ radians`` for positions float32 ``[..., axes]``."""
        # No MatMul: an engine may round its inputs to TF32, which cannot hold place 2049.
        column = self.writer.node("Unsqueeze", f"{name}/column", [positions, self.ops.whole(-1)])
        each = self.writer.node("Mul", f"{name}/each", [column, radians])
        ends, settings = [each, self.ops.whole(-2)], {"keepdims": 0}
        return self.writer.node("ReduceSum", name, ends, attributes=settings)

    def looked_up(self, tables: Sequence[str], places: str) -> list[str]:
        """The rows `places` of each table, gathered once in a graph."""
        for table in tables:
            if (table, places) not in self._rows:
                rows = self.writer.node("Gather", f"{table}/rows", [table, places])
                self._rows[table, places] = rows
        return [self._rows[table, places] for table in tables]

    def text(self, spec: TextDecoder) -> TextOps:
        """Causal attention whose keys and values are past and new ones together."""
        return Concatenated(self.writer, spec, self)

    def _heads(self, name: str, part: str, x: str, heads: int, head_dim: int) -> str:
        return self.ops.heads(f"{name}.{part}", x, heads, head_dim)

    def _column(self, turn: str) -> str:
        """Cosines or sines ``[..., length, half]`` for all heads of a place alike."""
        if turn not in self._columns:
            made = self.writer.node("Unsqueeze", f"{turn}/heads", [turn, self.ops.whole(-2)])
            self._columns[turn] = made
        return self._columns[turn]

    def _length_mask(self, lengths: str, keys: str) -> str:
        """What hides all but the first `lengths` int32 ``[batch]`` keys, once in a graph."""
        if lengths not in self._masks:
            writer, name = self.writer, f"{lengths}/mask"
            shape = {"start": 1, "end": 2}
            axis = writer.node("Shape", f"{name}/keys", [keys], attributes=shape)
            count = writer.node("Squeeze", f"{name}/count", [axis, self.ops.whole(0)])
            ends = [writer.constant(f"{name}/{n}", np.array(n, np.int64)) for n in (0, 1)]
            places = writer.node("Range", f"{name}/places", [ends[0], count, ends[1]])
            whole = {"to": TensorProto.INT64}
            most = writer.node("Cast", f"{name}/lengths", [lengths], attributes=whole)
            column = writer.node("Unsqueeze", f"{name}/column", [most, self.ops.whole(1, 2, 3)])
            seen = writer.node("Less", f"{name}/seen", [places, column])
            values = [seen, self.ops.number(0.0), self.ops.number(HIDDEN)]
            self._masks[lengths] = writer.node("Where", f"{name}/hidden", values)
        return self._masks[lengths]

    def _norm(
        self, op: str, name: str, inputs: Sequence[str], outputs: list[str], epsilon: float
    ) -> None:
        """A norm, behind the sum of residual, addition and bias where `op` takes these."""
        x, rest = inputs[0], list(inputs[1:])
        if op.startswith("Skip"):
            vectors = 1 if op in RMS_NORMS else 2
            addition, gammas, biases = rest[0], rest[1 : 1 + vectors], rest[1 + vectors :]
            for bias in biases:
                addition = self.writer.node("Add", f"{name}/bias", [addition, bias])
            summed = outputs[3:] or None
            x = self.writer.node("Add", f"{name}/sum", [x, addition], outputs=summed)
            rest = gammas
        if op in RMS_NORMS:
            self.ops.rms_norm(name, x, rest[0], epsilon, output=outputs[0])
            return
        settings = {"epsilon": epsilon, "axis": -1}
        inputs = [x, *rest]
        self.writer.node(
            "LayerNormalization", name, inputs, outputs=outputs[:1], attributes=settings
        )


def _number(attributes: Attributes, name: str) -> float:
    value = attributes[name]
    if not isinstance(value, int | float):
        raise ValueError(f"attribute '{name}' is {value!r}; expected a number")
    return float(value)
