"""The text half of CLIP as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.clip import ClipText
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import Layers, Projection, Stream, activate
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def write_clip_text(
    folder: Path, name: str, spec: ClipText, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids and attention_mask int64 [texts, length] -> text_embeds float32 [texts, output_size],
    not normalised, and logit_scale float32 [], already exponentiated, where the spec has one. The
    state at the first end token of a text counts, or at its highest id where the spec says so; padding
    may stand on either side, and positions count it. Raises `InputRefused` when tensors are missing
    or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        _Text(writer, spec, weights, accuracy_level).build()
        return writer.finish()


class _Text:
    """Values are float32 ``[texts, length, hidden]`` until the end token's row is taken."""

    def __init__(
        self, writer: GraphWriter, spec: ClipText, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        prefixes = (spec.prefix, "encoder.")
        self.layers = Layers(writer, weights, accuracy_level, spec.norm_eps, prefixes)
        self.ids = writer.input("input_ids", INT64, ["texts", "length"])
        mask = writer.input("attention_mask", INT64, ["texts", "length"])
        self.mask = writer.node("Cast", "key_mask", [mask], attributes={"to": INT32})

    def build(self) -> None:
        spec, writer = self.spec, self.writer
        embeds = writer.output("text_embeds", FLOAT, ["texts", spec.output_size])
        stream = Stream(self._embedded())
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        ended = self._ended(stream)
        name, level = f"{spec.prefix}final_layer_norm", self.layers.accuracy_level
        normed, _ = self.layers.norm(name, ended, spec.hidden_size, last=True)
        matrix = self.weights.matrix(spec.projection, spec.output_size, spec.hidden_size)
        linear(writer, "projection", normed, matrix, level, output=embeds)
        if spec.logit_scale:
            stored = self.weights.array(spec.logit_scale, ()).reshape(1).astype(np.float32)
            scale = writer.node("Exp", "scale", [writer.constant("log_scale", stored)])
            writer.node(
                "Squeeze", "scalar", [scale], outputs=[writer.output("logit_scale", FLOAT, [])]
            )

    def _embedded(self) -> str:
        """Token embeddings with the positions of their places."""
        spec, writer = self.spec, self.writer
        table = self.weights.matrix(spec.embedding, spec.vocab_size, spec.hidden_size)
        tokens = table_rows(writer, spec.embedding, table, self.ids, "tokens")
        stored = self.weights.array(spec.positions, (spec.max_positions, spec.hidden_size))
        positions = float_weight(writer, "positions", stored)
        zero, one = (writer.constant(f"places.{n}", np.array([n], np.int64)) for n in (0, 1))
        ends = {"start": 1, "end": 2}
        length = writer.node("Shape", "length", [self.ids], attributes=ends)
        rows = writer.node("Slice", "placed_rows", [positions, zero, length, zero, one])
        return writer.node("Add", "placed", [tokens, rows])

    def _block(self, layer: int, x: Stream) -> Stream:
        layers, at, name = self.layers, self.spec.layer(layer), f"layers.{layer}"
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        normed, residual = layers.norm(f"{at}layer_norm1", x, hidden)
        attended, out = self._attention(name, f"{at}self_attn.", normed), f"{name}.out_proj"
        product = layers.product(f"{at}self_attn.out_proj", attended, (hidden, hidden), name=out)
        normed, residual = layers.norm(f"{at}layer_norm2", Stream(residual, *product), hidden)
        wide = layers.product(f"{at}mlp.fc1", normed, (inner, hidden), name=f"{name}.fc1")
        active = activate(self.writer, f"{name}.gelu", self.spec.activation, *wide)
        narrow = layers.product(f"{at}mlp.fc2", active, (hidden, inner), name=f"{name}.fc2")
        return Stream(residual, *narrow)

    def _attention(self, name: str, at: str, x: str) -> str:
        """Attention of every position to itself and those before it, as far as the mask has them."""
        spec = self.spec
        shape = (spec.hidden_size, spec.hidden_size)
        parts = [Projection(f"{at}{part}_proj", x, shape, f"{name}.{part}_proj") for part in "qkv"]
        values, bias = self.layers.projected(f"{name}.qkv_proj.bias", parts)
        return self.writer.node(
            "MultiHeadAttention",
            f"{name}.attention",
            [*values, bias, self.mask],
            domain=MICROSOFT,
            attributes={
                "num_heads": spec.heads,
                "scale": float(np.float32((spec.hidden_size // spec.heads) ** -0.5)),
                "unidirectional": 1,
            },
        )

    def _ended(self, x: Stream) -> Stream:
        """The stream at each text's end token: rows ``[texts, hidden]``."""
        writer, end = self.writer, self.spec.end
        marked = self.ids
        if end is not None:
            wanted = writer.constant("end_token", np.array([end], np.int64))
            marked = writer.node("Equal", "is_end", [self.ids, wanted])
        marks = writer.node("Cast", "end_marks", [marked], attributes={"to": INT32})
        # The first of equal values, as in torch.
        place = writer.node("ArgMax", "end_place", [marks], attributes={"axis": 1, "keepdims": 1})
        batch = {"batch_dims": 1}
        rows = [
            writer.node("GatherND", f"end_{what}", [value, place], attributes=batch)
            for what, value in (("residual", x.residual), ("addition", x.addition))
        ]
        return Stream(rows[0], rows[1], x.bias)
