"""BERT encoders and their heads as ONNX graphs of onnxruntime's fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.bert import BertSpec, HeadSpec, TextEncoderSpec
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import PLAIN, Layers, Projection, activate
from exporter.graphs.linear import float_weight
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph


def write_text_encoder(
    folder: Path, name: str, spec: TextEncoderSpec, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids, attention_mask and, for BERT, token_type_ids int64 [texts, length] ->
    last_hidden_state float32 [texts, length, hidden], or logits [texts, labels] of a head over
    texts, [texts, length, labels] of one over tokens. Raises `InputRefused` when tensors are missing
    or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        bert = Bert(writer, spec.bert, weights, accuracy_level)
        if spec.head is None:
            shape: list[int | str] = ["texts", "length", spec.bert.hidden_size]
            out = writer.output("last_hidden_state", TensorProto.FLOAT, shape)
            bert.states(types=bool(spec.bert.names.types), output=out)
        else:
            _head(bert, spec.head, bert.states(types=bool(spec.bert.names.types))[-1])
        return writer.finish()


class Bert:
    """Writes one encoder into a graph; values are float32 ``[texts, length, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: BertSpec, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.layers = Layers(writer, weights, accuracy_level, spec.norm_eps)

    def states(self, *, types: bool, output: str | None = None) -> list[str]:
        """Declare the inputs; hidden states before the first block and behind each one.

        `types`: kinds of token are an input, else all are of kind 0. `output` names the last states.
        """
        writer = self.writer
        axes: list[int | str] = ["texts", "length"]
        ids = writer.input("input_ids", TensorProto.INT64, axes)
        mask = writer.input("attention_mask", TensorProto.INT64, axes)
        kinds = writer.input("token_type_ids", TensorProto.INT64, axes) if types else ""
        to = {"to": TensorProto.INT32}
        padding = writer.node("Cast", "attention_mask/int32", [mask], attributes=to)
        found = [self._embedded(ids, kinds)]
        for layer in range(self.spec.layers):
            last = layer == self.spec.layers - 1
            found.append(self._block(layer, found[-1], padding, output if last else None))
        return found

    def first_token(self, states: str) -> str:
        """The first token's rows ``[texts, hidden]``."""
        bounds = [
            self.writer.constant(f"first.{name}", np.array([value], np.int64))
            for name, value in (("start", 0), ("end", 1), ("axis", 1))
        ]
        rows = self.writer.node("Slice", "first_rows", [states, *bounds])
        return self.writer.node("Squeeze", "first_token", [rows, bounds[2]])

    def dense(self, name: str, x: str, shape: tuple[int, int], output: str | None = None) -> str:
        """The linear layer `name` ``[outputs, inputs]`` with its bias."""
        product, bias = self.layers.product(name, x, shape)
        outputs = [output] if output else None
        return self.writer.node("Add", f"{name}/bias", [product, bias], outputs=outputs)

    def _embedded(self, ids: str, kinds: str) -> str:
        """Norm of the sum of words, positions and kinds of token."""
        writer, spec, names = self.writer, self.spec, self.spec.names
        table = f"{spec.name(names.words)}.weight"
        words = self.weights.matrix(table, spec.vocab_size, spec.hidden_size)
        x = table_rows(writer, table, words, ids, "words")
        if kinds:
            rows = self._table(names.types, spec.type_vocab_size)
            added = writer.node("Gather", "types", [rows, kinds])
            x = writer.node("Add", "words_and_types", [x, added])
        elif names.types:
            rows = self._table(names.types, spec.type_vocab_size, first=1)
            x = writer.node("Add", "words_and_types", [x, rows])
        positions = self._table(names.positions, spec.max_positions)
        length = writer.node("Shape", "length", [ids], attributes={"start": 1, "end": 2})
        bounds = [
            writer.constant(f"positions.{p}", np.array([0], np.int64)) for p in ("start", "axis")
        ]
        placed = writer.node("Slice", "positions", [positions, bounds[0], length, bounds[1]])
        x = writer.node("Add", "embedded", [x, placed])
        vectors = self._norm_vectors(spec.name(names.norm))
        attributes = {"epsilon": spec.norm_eps, "axis": -1}
        return writer.node(
            "LayerNormalization", spec.name(names.norm), [x, *vectors], attributes=attributes
        )

    def _table(self, part: str, rows: int, first: int | None = None) -> str:
        """The `first` rows (all of them unless said) of a small table, as float32."""
        name = f"{self.spec.name(part)}.weight"
        values = self.weights.array(name, (rows, self.spec.hidden_size))
        return float_weight(self.writer, name, values[:first])

    def _block(self, layer: int, x: str, padding: str, output: str | None) -> str:
        """Attention, then the MLP, each added to its input before its norm."""
        spec, names, at = self.spec, self.spec.names, self.spec.block(layer)
        hidden, inner = spec.hidden_size, spec.intermediate_size
        attended = self._attention(at, x, padding)
        product = self.layers.product(at + names.out, attended, (hidden, hidden))
        x = self._added(at + names.first_norm, x, product)
        wide = self.layers.product(at + names.up, x, (inner, hidden))
        active = activate(self.writer, f"{at}active", spec.activation, *wide)
        product = self.layers.product(at + names.down, active, (hidden, inner))
        return self._added(at + names.second_norm, x, product, output)

    def _attention(self, at: str, x: str, padding: str) -> str:
        """Attention of all tokens to those that are no padding."""
        spec, names = self.spec, self.spec.names
        shape = (spec.hidden_size, spec.hidden_size)
        parts = [
            Projection(at + part, x, shape, at + part)
            for part in (names.query, names.key, names.value)
        ]
        values, bias = self.layers.projected(f"{at}attention.biases", parts)
        attributes = {"num_heads": spec.heads, "scale": float(np.float32(spec.head_dim**-0.5))}
        return self.writer.node(
            "MultiHeadAttention",
            f"{at}attention",
            [*values, bias, padding],
            domain=MICROSOFT,
            attributes=attributes,
        )

    def _added(self, name: str, x: str, product: tuple[str, str], output: str | None = None) -> str:
        """Layer norm of x and what a linear layer gives."""
        addition, bias = product
        return self.writer.node(
            "SkipLayerNormalization",
            name,
            [x, addition, *self._norm_vectors(name), bias],
            domain=MICROSOFT,
            outputs=[output] if output else None,
            attributes={"epsilon": self.spec.norm_eps},
        )

    def _norm_vectors(self, name: str) -> Sequence[str]:
        size = self.spec.hidden_size
        return [self.layers.vector(f"{name}.{part}", size) for part in ("weight", "bias")]


def _head(bert: Bert, head: HeadSpec, states: str) -> None:
    """The classifier over all tokens, or over the first one behind its dense layer."""
    writer, hidden = bert.writer, bert.spec.hidden_size
    rows: list[int | str] = ["texts"] if head.dense else ["texts", "length"]
    out = writer.output("logits", TensorProto.FLOAT, [*rows, head.labels])
    if head.dense:
        dense = bert.dense(head.dense, bert.first_token(states), (hidden, hidden))
        states = writer.node(PLAIN[head.activation], f"{head.dense}/active", [dense])
    bert.dense("classifier", states, (head.labels, hidden), out)
