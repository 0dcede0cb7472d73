"""T5 as two ONNX graphs of onnxruntime's fused ops: a text's cross keys and values, and the decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix
from exporter.families.specs.gpt2 import cross_names
from exporter.families.specs.t5 import T5Decoder, T5Encoder, T5Sizes, bias_by_distance
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import Stream, add_norm
from exporter.graphs.linear import linear
from exporter.graphs.matrices import Matrix
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
LAST = np.iinfo(np.int64).max
# Added to the score of a place that must not be seen; a softmax makes an exact 0 of it.
HIDDEN = float(np.finfo(np.float32).min)


def write_t5_encoder(
    folder: Path, name: str, spec: T5Encoder, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids, attention_mask int64 [batch, length] (1: a token, 0: padding) ->
    cross_key_values.{i}.key|value float32 [batch, heads, length, head_dim] for each block i of the
    decoder. Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        ids = writer.input("input_ids", INT64, ["batch_size", "encoder_sequence_length"])
        mask = writer.input("attention_mask", INT64, ["batch_size", "encoder_sequence_length"])
        t5, sizes = _T5(writer, spec.sizes, weights, accuracy_level), spec.sizes
        x, addition = t5.embedded(ids), ""
        bias = _encoder_bias(t5, ids, mask)
        for layer in range(sizes.encoder_layers):
            at = f"encoder.block.{layer}.layer."
            normed, x = t5.norm(f"{at}0.layer_norm", x, addition)
            parts = t5.projected(f"{at}0.SelfAttention.", normed, "qkv")
            attended = t5.attend(f"{at}0.SelfAttention", [*parts, "", "", bias])
            addition = t5.product(f"{at}0.SelfAttention.o", attended, sizes.inner)
            x, addition = t5.feed_forward(f"{at}1.", x, addition)
        states, _ = t5.norm("encoder.final_layer_norm", x, addition, last=True)
        for layer in range(sizes.decoder_layers):
            _cross_outputs(t5, layer, states)
        return writer.finish()


def write_t5_decoder(
    folder: Path, name: str, spec: T5Decoder, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``, beginning and continuation of a text in one graph.

    input_ids int64 [batch, sequence]; encoder_attention_mask int64 [batch, length];
    num_logits_to_keep int64 scalar (0 keeps all); past_key_values.{i}.key|value float32
    [batch, heads, past, head_dim]; cross_key_values.{i}.key|value as `write_t5_encoder` gives them ->
    logits float32 [batch, kept, vocab], present.{i}.key|value. Raises `InputRefused` when tensors are
    missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        _Decoder(_T5(writer, spec.sizes, weights, accuracy_level, again=True)).build()
        return writer.finish()


class _T5:
    """Writes pieces of both graphs; values are float32 ``[batch, length, hidden]``.

    A residual value goes from piece to piece with what waits to be added to it: the next norm adds
    both in the same pass. `again`: another graph has the embedding too.
    """

    def __init__(
        self,
        writer: GraphWriter,
        sizes: T5Sizes,
        weights: WeightSource,
        accuracy_level: int,
        *,
        again: bool = False,
    ) -> None:
        self.writer = writer
        self.sizes = sizes
        self.weights = weights
        self.accuracy_level = accuracy_level
        spec = sizes.embedding
        self.table: Matrix = weights.matrix(spec.name, *spec.shape, again=again)

    def embedded(self, ids: str) -> str:
        """Rows of the embedding."""
        return table_rows(self.writer, self.sizes.embedding.name, self.table, ids, "embedded")

    def norm(
        self, name: str, x: str, addition: str, *, last: bool = False, factor: float = 1.0
    ) -> tuple[str, str]:
        """RMS norm of x + addition times `factor`, and that sum (not of the `last` norm)."""
        vector = self.weights.vector(f"{name}.weight", self.sizes.hidden_size)
        scale = self.writer.weight(f"{name}.weight", vector * np.float32(factor))
        stream, epsilon = Stream(x, addition), self.sizes.norm_eps
        return add_norm(self.writer, name, stream, [scale], epsilon, last=last)

    def projected(self, name: str, x: str, parts: str) -> list[str]:
        """Queries, keys or values of the attention called `name` (with its dot)."""
        return [self.product(f"{name}{part}", x, self.sizes.hidden_size) for part in parts]

    def product(self, name: str, x: str, inputs: int) -> str:
        """Product with the matrix `name`, all of which are as wide as heads or hidden states."""
        outer = name.endswith((".o", ".wo"))
        wide = self.sizes.intermediate_size if ".DenseReluDense." in name else self.sizes.inner
        rows = self.sizes.hidden_size if outer else wide
        matrix = self.weights.matrix(f"{name}.weight", rows, inputs)
        return linear(self.writer, name, x, matrix, self.accuracy_level)

    def attend(self, name: str, inputs: list[str], outputs: list[str] | None = None) -> str:
        """Attention whose scores are not divided by anything; `inputs` as MultiHeadAttention's."""
        return self.writer.node(
            "MultiHeadAttention",
            name,
            inputs,
            domain=MICROSOFT,
            outputs=outputs,
            attributes={"num_heads": self.sizes.heads, "scale": 1.0},
        )

    def feed_forward(self, layer: str, x: str, addition: str) -> tuple[str, str]:
        """The feed-forward layer `layer` (with its dot) over x + addition."""
        normed, x = self.norm(f"{layer}layer_norm", x, addition)
        at, width = f"{layer}DenseReluDense.", self.sizes.hidden_size
        if self.sizes.gated:
            wide = self.product(f"{at}wi_0", normed, width)
            active = self.writer.node("FastGelu", f"{at}gelu", [wide], domain=MICROSOFT)
            gate = self.product(f"{at}wi_1", normed, width)
            active = self.writer.node("Mul", f"{at}gated", [active, gate])
        else:
            active = self.writer.node("Relu", f"{at}relu", [self.product(f"{at}wi", normed, width)])
        return x, self.product(f"{at}wo", active, self.sizes.intermediate_size)

    def length(self, name: str, x: str, axis: int) -> str:
        """The size of an axis, as a scalar."""
        ends = {"start": axis, "end": axis + 1}
        shape = self.writer.node("Shape", f"{name}.shape", [x], attributes=ends)
        return self.writer.node("Squeeze", name, [shape])

    def number(self, value: int) -> str:
        """An int64 scalar."""
        return self.writer.constant(f"number.{value}", np.array(value, np.int64))

    def list(self, *values: int) -> str:
        """An int64 vector."""
        name = "list." + "_".join(map(str, values))
        return self.writer.constant(name, np.array(values, np.int64))

    def hidden(self) -> str:
        """What is added to scores of places that must not be seen."""
        return self.writer.constant("hidden", np.array(HIDDEN, np.float32))

    def padding(self, name: str, mask: str) -> str:
        """What a mask ``[batch, length]`` adds to scores, ``[batch, 1, 1, length]``."""
        writer = self.writer
        flags = writer.node("Cast", f"{name}.flags", [mask], attributes={"to": TensorProto.BOOL})
        zero = writer.constant("seen", np.array(0.0, np.float32))
        row = writer.node("Where", f"{name}.row", [flags, zero, self.hidden()])
        return writer.node("Unsqueeze", name, [row, self.list(1, 2)])

    def distance_bias(self, block: str, rows: str, *, both: bool) -> str:
        """The biases of rows (int64 ``[queries, keys]``) of the block's table, ``[heads, queries, keys]``."""
        spec = self.sizes.distances(block)
        table = self.weights.array(spec.name, spec.shape).astype(np.float32)
        values: NDArray[np.float32] = bias_by_distance(table, self.sizes.max_distance, both=both)
        stored = self.writer.weight("bias_by_distance", values)
        found = self.writer.node("Gather", "distance_bias.rows", [stored, rows])
        return self.writer.node(
            "Transpose", "distance_bias", [found], attributes={"perm": [2, 0, 1]}
        )


def _encoder_bias(t5: _T5, ids: str, mask: str) -> str:
    """Biases of all distances with the padding hidden, ``[batch, heads, length, length]``."""
    writer, far = t5.writer, t5.sizes.max_distance
    length = t5.length("length", ids, 1)
    places = writer.node("Range", "places", [t5.number(0), length, t5.number(1)])
    queries = writer.node("Unsqueeze", "query_places", [places, t5.list(1)])
    behind = writer.node("Sub", "behind", [places, queries])
    near = writer.node("Clip", "near", [behind, t5.number(-far), t5.number(far)])
    rows = writer.node("Add", "rows", [near, t5.number(far)])
    bias = t5.distance_bias("encoder.block.0.", rows, both=True)
    return writer.node("Add", "attention_bias", [bias, t5.padding("padding", mask)])


def _cross_outputs(t5: _T5, layer: int, states: str) -> None:
    """What one block of the decoder makes of the text."""
    writer, sizes, at = t5.writer, t5.sizes, t5.sizes.cross(layer)
    heads = writer.constant("cross.heads", np.array([0, 0, sizes.heads, sizes.head_dim], np.int64))
    shape: list[int | str] = [
        *("batch_size", sizes.heads, "encoder_sequence_length", sizes.head_dim)
    ]
    names = cross_names(sizes.decoder_layers)[2 * layer : 2 * layer + 2]
    for part, output in zip("kv", names, strict=True):
        product = t5.product(f"{at}{part}", states, sizes.hidden_size)
        parted = writer.node("Reshape", f"{at}{part}.heads", [product, heads])
        given = writer.output(output, FLOAT, shape)
        turn = {"perm": [0, 2, 1, 3]}
        writer.node("Transpose", f"{at}{part}.turn", [parted], outputs=[given], attributes=turn)


class _Decoder:
    def __init__(self, t5: _T5) -> None:
        self.t5, self.writer, self.sizes = t5, t5.writer, t5.sizes
        writer = t5.writer
        self.ids = writer.input("input_ids", INT64, ["batch_size", "sequence_length"])
        rows: list[int | str] = ["batch_size", "encoder_sequence_length"]
        self.seen = t5.padding("seen_padding", writer.input("encoder_attention_mask", INT64, rows))
        keep = writer.input("num_logits_to_keep", INT64, [])
        shape: list[int | str] = ["batch_size", "kept_length", t5.sizes.vocab_size]
        self.logits = writer.output("logits", FLOAT, shape)
        # Slicing from -n keeps n positions; from -0 = 0 it keeps all.
        starts = writer.node("Neg", "keep_from", [keep])
        self.starts = writer.node("Reshape", "keep_starts", [starts, t5.list(1)])

    def build(self) -> None:
        t5, sizes = self.t5, self.sizes
        x, addition = t5.embedded(self.ids), ""
        past = self._values("past_key_values", "past_sequence_length")
        cross = self._values("cross_key_values", "encoder_sequence_length")
        bias = self._bias(past[0][0])
        unseen = self._unseen("cross_bias", x)
        for layer in range(sizes.decoder_layers):
            at = f"decoder.block.{layer}.layer."
            normed, x = t5.norm(f"{at}0.layer_norm", x, addition)
            attended = self._self_attention(layer, normed, bias, past[layer])
            if layer == sizes.decoder_layers - 1:
                # Behind the last attention no position needs another: drop those nobody asked for.
                attended, x = self._keep("keep_attended", attended), self._keep("keep_residual", x)
                unseen = self._unseen("last_cross_bias", x)
            addition = t5.product(f"{at}0.SelfAttention.o", attended, sizes.inner)
            normed, x = t5.norm(f"{at}1.layer_norm", x, addition)
            queries = t5.projected(sizes.cross(layer), normed, "q")
            found = t5.attend(f"{at}1.attention", [*queries, *cross[layer], "", "", unseen])
            addition = t5.product(f"{sizes.cross(layer)}o", found, sizes.inner)
            x, addition = t5.feed_forward(f"{at}2.", x, addition)
        factor = sizes.hidden_size**-0.5 if sizes.scaled else 1.0
        normed, _ = t5.norm("decoder.final_layer_norm", x, addition, last=True, factor=factor)
        self._head(normed)

    def _values(self, name: str, length: str) -> list[tuple[str, str]]:
        """Inputs with keys and values of every block."""
        shape: list[int | str] = ["batch_size", self.sizes.heads, length, self.sizes.head_dim]
        parts = [
            [self.writer.input(f"{name}.{i}.{part}", FLOAT, shape) for part in ("key", "value")]
            for i in range(self.sizes.decoder_layers)
        ]
        return [(key, value) for key, value in parts]

    def _bias(self, past: str) -> str:
        """Biases of distances with later places hidden, ``[1, heads, sequence, past + sequence]``."""
        t5, writer = self.t5, self.writer
        before = t5.length("past_length", past, 2)
        length = t5.length("new_length", self.ids, 1)
        end = writer.node("Add", "total_length", [before, length])
        keys = writer.node("Range", "key_places", [t5.number(0), end, t5.number(1)])
        places = writer.node("Range", "new_places", [before, end, t5.number(1)])
        queries = writer.node("Unsqueeze", "query_places", [places, t5.list(1)])
        distance = writer.node("Sub", "distance", [queries, keys])
        far = t5.number(self.sizes.max_distance)
        near = writer.node("Clip", "near", [distance, t5.number(0), far])
        bias = t5.distance_bias("decoder.block.0.", near, both=False)
        later = writer.node("Less", "later", [distance, t5.number(0)])
        causal = writer.node("Where", "causal_bias", [later, t5.hidden(), bias])
        return writer.node("Unsqueeze", "attention_bias", [causal, t5.list(0)])

    def _unseen(self, name: str, x: str) -> str:
        """The text's padding for every position of `x`, as the attention op wants it."""
        ends = {"start": 1, "end": 2}
        length = self.writer.node("Shape", f"{name}.length", [x], attributes=ends)
        ones = self.t5.list(1)
        parts = [ones, ones, length, ones]
        shape = self.writer.node("Concat", f"{name}.shape", parts, attributes={"axis": 0})
        return self.writer.node("Expand", name, [self.seen, shape])

    def _self_attention(self, layer: int, x: str, bias: str, past: tuple[str, str]) -> str:
        t5, sizes, name = self.t5, self.sizes, f"decoder.block.{layer}.layer.0.SelfAttention"
        shape: list[int | str] = [
            *("batch_size", sizes.heads, "present_sequence_length", sizes.head_dim)
        ]
        parts = t5.projected(f"{name}.", x, "qkv")
        present = [
            self.writer.output(f"present.{layer}.{part}", FLOAT, shape) for part in ("key", "value")
        ]
        return t5.attend(name, [*parts, "", "", bias, *past], [f"{name}:0", *present])

    def _keep(self, name: str, x: str) -> str:
        """The positions of `x` whose logits are asked for."""
        ends = [self.starts, self.t5.list(LAST), self.t5.list(1)]
        return self.writer.node("Slice", name, [x, *ends])

    def _head(self, x: str) -> None:
        t5, writer, sizes = self.t5, self.writer, self.sizes
        if not sizes.tied:
            head = t5.weights.matrix(sizes.head.name, *sizes.embedding.shape)
            linear(writer, "head", x, head, t5.accuracy_level, output=self.logits)
        elif isinstance(t5.table, PackedMatrix):
            self._packed_head(x, t5.table)
        else:
            self._float_head(x)

    def _float_head(self, x: str) -> None:
        """Product with the embedding's own bytes: a second, turned copy would double the file."""
        writer, width = self.writer, self.sizes.hidden_size
        rows = writer.node("Reshape", "head.rows", [x, self.t5.list(-1, width)])
        table = writer.node("Cast", "head.weight", ["embedding.weight"], attributes={"to": FLOAT})
        product = writer.node("Gemm", "head", [rows, table], attributes={"transB": 1})
        shape = writer.node("Shape", "head.leading", [x], attributes={"start": 0, "end": 2})
        parts = [shape, self.t5.list(self.sizes.vocab_size)]
        whole = writer.node("Concat", "head.shape", parts, attributes={"axis": 0})
        writer.node("Reshape", "head.logits", [product, whole], outputs=[self.logits])

    def _packed_head(self, x: str, table: PackedMatrix) -> None:
        """The same with the embedding's packed bytes, which the lookup has in another shape."""
        writer, form = self.writer, table.format
        shape = writer.constant("head.shape", np.array(table.qdata.shape, np.int64))
        data = writer.node("Reshape", "head.qdata", ["embedding.qdata", shape])
        scales = writer.node("Cast", "head.scales", ["embedding.scales"], attributes={"to": FLOAT})
        inputs = [x, data, scales]
        if table.zero_points is not None:
            inputs.append("embedding.zero_points")
        writer.node(
            "MatMulNBits",
            "head",
            inputs,
            domain=MICROSOFT,
            outputs=[self.logits],
            attributes={
                "K": table.columns,
                "N": table.rows,
                "bits": form.bits,
                "block_size": form.block,
                "accuracy_level": self.t5.accuracy_level,
            },
        )
