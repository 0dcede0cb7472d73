"""The Llama decoder as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import linear
from exporter.graphs.matrices import Matrix, stack_rows
from exporter.graphs.rotary import AxisRotary, rotary_tables, section_frequencies
from exporter.graphs.texts import TextGraph
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

NAME = "decoder_model_merged"
INT64 = TensorProto.INT64


@dataclass(frozen=True)
class DecoderOptions:
    """`accuracy_level` of packed matrices; whether gate and up share one matrix product."""

    accuracy_level: int = 4
    fuse_mlp: bool = True


def write_decoder(
    folder: Path,
    spec: DecoderSpec,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs: inputs_embeds float32 [batch, sequence, hidden]; attention_mask int64 [batch, total],
    ones then zeros (padding on the right); num_logits_to_keep int64 scalar (0 keeps all);
    past_key_values.{i}.key|value float32 [batch, kv_heads, past, head_dim]; with M-RoPE also
    position_ids int64 [axes, batch, sequence]. Outputs: logits and present.{i}.key|value. Past and
    present may be one buffer of any length.
    Raises `InputRefused` when tensors are missing or of other shapes, or the attention op cannot
    do the head size.
    """
    check_head_size(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        llama = LlamaGraph(writer, spec, weights, options)
        embeds, logits = llama.begin(spec.vocab_size)
        stream = (embeds, "")
        for layer in range(spec.layers):
            stream = llama.block(layer, *stream)
        linear(
            writer,
            "head",
            llama.final(*stream),
            llama.head(),
            options.accuracy_level,
            output=logits,
        )
        return writer.finish()


def check_head_size(spec: DecoderSpec, dialect: OpenDialect | None = None) -> None:
    """Raise `InputRefused` when the attention op cannot do the head size."""
    if dialect is None and spec.head_dim % 16 and not spec.mrope:
        raise InputRefused(
            f"config.json: head_dim is {spec.head_dim}; onnxruntime's GroupQueryAttention with "
            "rotary positions needs a multiple of 16, this model cannot be exported for it"
        )


class LlamaGraph:
    """Writes pieces of one Llama decoder into a graph; values are float32 ``[batch, sequence, hidden]``.

    A residual value goes from piece to piece together with what waits to be added to it (empty:
    nothing): the next norm adds both in the same pass.
    """

    def __init__(
        self, writer: GraphWriter, spec: DecoderSpec, weights: WeightSource, options: DecoderOptions
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.options = options
        self.shapes = spec.matrix_shapes()

    def begin(self, vocabulary: int) -> tuple[str, str]:
        """Declare the inputs and outputs that no block owns; returns inputs_embeds and logits."""
        self.text = TextGraph(self.writer, self.spec, vocabulary)
        self._positions()
        return self.text.embeds, self.text.logits

    def block(self, layer: int, residual: str, addition: str) -> tuple[str, str]:
        """Block `layer`: attention, then the MLP, each behind its norm and added to the residual."""
        name, spec = f"layers.{layer}", self.spec
        at = f"{spec.prefix}{name}."
        gamma = f"{at}input_layernorm.weight"
        normed, residual = self.add_norm(f"{name}.input_norm", residual, addition, gamma)
        attended = self.text.attention(layer, self._queries(layer, normed), self.tables)
        if layer == spec.layers - 1:
            # Behind the last attention no position needs another: drop those nobody asked for.
            attended = self.text.keep("keep_attended", attended)
            residual = self.text.keep("keep_residual", residual)
        projected = self.product(f"{name}.o_proj", f"{at}self_attn.o_proj.weight", attended)
        gamma = f"{at}post_attention_layernorm.weight"
        normed, residual = self.add_norm(f"{name}.post_norm", residual, projected, gamma)
        return residual, self.mlp(name, f"{at}mlp.", normed)

    def final(self, residual: str, addition: str) -> str:
        """The norm behind the last block."""
        normed, _ = self.add_norm("final_norm", residual, addition, self.spec.final_norm)
        return normed

    def _positions(self) -> None:
        """Tables for the attention op, or what turns queries and keys before it."""
        spec, writer = self.spec, self.writer
        self.tables: list[str] = []
        self.axes: AxisRotary | None = None
        self.places = ""
        if not spec.mrope:
            cos, sin = rotary_tables(spec.max_positions, spec.head_dim, spec.rope_theta)
            self.tables = [writer.weight("rotary.cos", cos), writer.weight("rotary.sin", sin)]
            return
        axes = len(spec.mrope)
        positions = writer.input("position_ids", INT64, [axes, "batch_size", "sequence_length"])
        table = section_frequencies(spec.head_dim, spec.rope_theta, spec.mrope)
        if writer.dialect is not None:
            last = {"perm": [1, 2, 0]}
            by_place = writer.node("Transpose", "rotary.rows", [positions], attributes=last)
            self.axes = AxisRotary(writer, by_place, table)
            return
        flat = writer.constant("rotary.flat", np.array([axes, -1], np.int64))
        rows = writer.node("Reshape", "rotary.axes", [positions, flat])
        turned = writer.node("Transpose", "rotary.rows", [rows], attributes={"perm": [1, 0]})
        self.axes = AxisRotary(writer, turned, table)
        shape = writer.node("Shape", "rotary.shape", [positions], attributes={"start": 1, "end": 3})
        count = writer.node("ReduceProd", "rotary.count", [shape], attributes={"keepdims": 0})
        zero, one = (writer.constant(f"rotary.{n}", np.array(n, np.int64)) for n in (0, 1))
        numbers = writer.node("Range", "rotary.numbers", [zero, count, one])
        self.places = writer.node("Reshape", "rotary.places", [numbers, shape])

    def add_norm(self, name: str, residual: str, addition: str, gamma: str) -> tuple[str, str]:
        """RMS norm of residual + addition, and that sum; without an addition, of the residual."""
        scale = self.writer.weight(
            f"{name}.weight", self.weights.vector(gamma, self.spec.hidden_size)
        )
        epsilon = {"epsilon": self.spec.norm_eps}
        if not addition:
            # onnxruntime registers this contrib op in the standard domain.
            normed = self.writer.node(
                "SimplifiedLayerNormalization",
                name,
                [residual, scale],
                attributes={**epsilon, "axis": -1},
            )
            return normed, residual
        outputs = [f"{name}:0", "", "", f"{name}:sum"]
        if gamma == self.spec.final_norm:
            outputs = outputs[:1]
        self.writer.node(
            "SkipSimplifiedLayerNormalization",
            name,
            [residual, addition, scale],
            domain=MICROSOFT,
            outputs=outputs,
            attributes=epsilon,
        )
        return outputs[0], outputs[-1]

    def _queries(self, layer: int, x: str) -> list[str]:
        """Query, key and value inputs of the attention op: one packed value where it takes that."""
        name, spec = f"layers.{layer}", self.spec
        at = f"{spec.prefix}{name}.self_attn."
        parts = {part: f"{at}{part}_proj.weight" for part in "qkv"}
        if len({self.weights.format(n) for n in parts.values()}) == 1:
            stacked = stack_rows([self._matrix(n) for n in parts.values()])
            packed = self._linear(f"{name}.qkv_proj", x, stacked)
            packed = self._biased(f"{name}.qkv_proj", packed, f"{at}q", f"{at}k", f"{at}v")
            if self.axes is None:
                return [packed, "", ""]
            q, k, v = self._split(f"{name}.qkv", packed)
        else:
            q, k, v = (
                self._biased(
                    f"{name}.{part}_proj",
                    self._linear(f"{name}.{part}_proj", x, self._matrix(n)),
                    at + part,
                )
                for part, n in parts.items()
            )
        if self.axes is not None:
            q = self.axes.turn(f"{name}.q_rotary", q, self.places, spec.heads)
            k = self.axes.turn(f"{name}.k_rotary", k, self.places, spec.kv_heads)
        return [q, k, v]

    def _biased(self, name: str, x: str, *projections: str) -> str:
        """A product with the biases of `projections` (names without ``_proj``), where the model has them."""
        if not self.spec.qkv_bias:
            return x
        shapes = self.spec.matrix_shapes()
        vectors = [
            self.weights.vector(f"{p}_proj.bias", shapes[f"self_attn.{p[-1]}_proj"][0])
            for p in projections
        ]
        bias = self.writer.weight(f"{name}.bias", np.concatenate(vectors))
        return self.writer.node("Add", f"{name}/bias", [x, bias])

    def _split(self, name: str, packed: str) -> tuple[str, str, str]:
        spec = self.spec
        keys = spec.kv_heads * spec.head_dim
        sizes = np.array([spec.heads * spec.head_dim, keys, keys], np.int64)
        q, k, v = (f"{name}:{part}" for part in "qkv")
        self.writer.node(
            "Split",
            name,
            [packed, self.writer.constant("qkv.sizes", sizes)],
            outputs=[q, k, v],
            attributes={"axis": -1},
        )
        return q, k, v

    def mlp(self, name: str, at: str, x: str) -> str:
        """The gated MLP whose tensors begin with `at`; its nodes begin with `name`."""
        writer = self.writer
        names = [f"{at}{part}_proj.weight" for part in ("gate", "up")]
        if self.options.fuse_mlp and len({self.weights.format(n) for n in names}) == 1:
            both = self._linear(f"{name}.gate_up", x, stack_rows([self._matrix(n) for n in names]))
            gate, up = f"{name}.split:gate", f"{name}.split:up"
            writer.node(
                "Split",
                f"{name}.split",
                [both],
                outputs=[gate, up],
                attributes={"axis": -1, "num_outputs": 2},
            )
        else:
            gate, up = (
                self._linear(f"{name}.{part}", x, self._matrix(n))
                for part, n in zip(("gate", "up"), names, strict=True)
            )
        # QuickGelu with alpha 1 is x * sigmoid(x), in one pass.
        silu = writer.node(
            "QuickGelu", f"{name}.silu", [gate], domain=MICROSOFT, attributes={"alpha": 1.0}
        )
        product = writer.node("Mul", f"{name}.gated", [silu, up])
        return self.product(f"{name}.down", f"{at}down_proj.weight", product)

    def head(self) -> Matrix:
        """The head's own matrix where the folder has one, else the embedding of a tied model."""
        spec = self.spec
        if spec.tied and not self.weights.has(spec.head):
            return self.weights.matrix(
                spec.embedding, spec.vocab_size, spec.hidden_size, again=True
            )
        return self.weights.matrix(spec.head, spec.vocab_size, spec.hidden_size)

    def product(self, name: str, tensor: str, x: str) -> str:
        """Product with the matrix `tensor` of a block."""
        return self._linear(name, x, self._matrix(tensor))

    def _matrix(self, name: str) -> Matrix:
        rows, columns = self.shapes[".".join(name.split(".")[-3:-1])]
        return self.weights.matrix(name, rows, columns)

    def _linear(self, name: str, x: str, matrix: Matrix) -> str:
        return linear(self.writer, name, x, matrix, self.options.accuracy_level)
