"""The text half of CLIP as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.clip import ClipText
from exporter.graphs.embedding import table_rows
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.vit import ACTIVATION_OPS, QUICK_GELU_ALPHA, Stream
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
        self.accuracy_level = accuracy_level
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
        normed, _ = self._norm(f"{spec.prefix}final_layer_norm", ended, last=True)
        matrix = self.weights.matrix(spec.projection, spec.output_size, spec.hidden_size)
        linear(writer, "projection", normed, matrix, self.accuracy_level, output=embeds)
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
        at, name = self.spec.layer(layer), f"layers.{layer}"
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        normed, residual = self._norm(f"{at}layer_norm1", x)
        attended = self._attention(name, f"{at}self_attn.", normed)
        product = self._product(f"{name}.out_proj", f"{at}self_attn.out_proj", attended, hidden)
        normed, residual = self._norm(f"{at}layer_norm2", Stream(residual, *product))
        wide = self._product(f"{name}.fc1", f"{at}mlp.fc1", normed, inner)
        active = self._activated(f"{name}.gelu", *wide)
        narrow = self._product(f"{name}.fc2", f"{at}mlp.fc2", active, hidden, inner)
        return Stream(residual, *narrow)

    def _attention(self, name: str, at: str, x: str) -> str:
        """Attention of every position to itself and those before it, as far as the mask has them."""
        spec = self.spec
        values, biases = [], []
        for part in "qkv":
            matrix = self.weights.matrix(
                f"{at}{part}_proj.weight", spec.hidden_size, spec.hidden_size
            )
            values.append(
                linear(self.writer, f"{name}.{part}_proj", x, matrix, self.accuracy_level)
            )
            biases.append(self.weights.vector(f"{at}{part}_proj.bias", spec.hidden_size))
        bias = self.writer.weight(f"{name}.qkv_proj.bias", np.concatenate(biases))
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

    def _activated(self, name: str, x: str, bias: str) -> str:
        kind, writer = self.spec.activation, self.writer
        if kind == "quick_gelu":
            biased = writer.node("Add", f"{name}/bias", [x, bias])
            alpha = {"alpha": QUICK_GELU_ALPHA}
            return writer.node("QuickGelu", name, [biased], domain=MICROSOFT, attributes=alpha)
        return writer.node(ACTIVATION_OPS[kind], name, [x, bias], domain=MICROSOFT)

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

    def _norm(self, tensor: str, x: Stream, *, last: bool = False) -> tuple[str, str]:
        """Layer norm of the stream's sum, and that sum (which the `last` norm does not give)."""
        name = self._short(tensor)
        vectors = [self._vector(f"{tensor}.{p}", self.spec.hidden_size) for p in ("weight", "bias")]
        epsilon = {"epsilon": self.spec.norm_eps}
        if not x.addition:
            attributes = {**epsilon, "axis": -1}
            inputs = [x.residual, *vectors]
            normed = self.writer.node("LayerNormalization", name, inputs, attributes=attributes)
            return normed, x.residual
        outputs = [f"{name}:0", *([] if last else ["", "", f"{name}:sum"])]
        self.writer.node(
            "SkipLayerNormalization",
            name,
            [x.residual, x.addition, *vectors, x.bias],
            domain=MICROSOFT,
            outputs=outputs,
            attributes=epsilon,
        )
        return outputs[0], outputs[-1]

    def _product(
        self, name: str, tensor: str, x: str, rows: int, columns: int | None = None
    ) -> tuple[str, str]:
        """Product with a linear layer (of `hidden_size` inputs unless given), and its bias, still to
        be added.
        """
        matrix = self.weights.matrix(f"{tensor}.weight", rows, columns or self.spec.hidden_size)
        product = linear(self.writer, name, x, matrix, self.accuracy_level)
        return product, self._vector(f"{tensor}.bias", rows)

    def _vector(self, tensor: str, size: int) -> str:
        return self.writer.weight(self._short(tensor), self.weights.vector(tensor, size))

    def _short(self, tensor: str) -> str:
        return tensor.removeprefix(self.spec.prefix).removeprefix("encoder.")
