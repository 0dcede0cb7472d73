"""Gemma 3's three graphs: pooled SigLIP rows, scaled embeddings, and a decoder of windowed and full layers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.families.specs.gemma3 import Gemma3Decoder, PooledSiglip, Rotary
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect, Reach
from exporter.graphs.embedding import NAME as EMBEDDING
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import Layers, Stream, add_norm
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.matrices import Matrix, stack_rows
from exporter.graphs.rotary import AxisRotary, frequencies
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.tower import NAME as TOWER
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
# Of position_ids: the place in the text, and the last place seen.
AXES = 2


def write_pooled_siglip(
    folder: Path,
    spec: PooledSiglip,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] -> image_features float32
    [batch * tiles, tokens, output_size]. Raises `InputRefused` when tensors are missing or of
    other shapes.
    """
    with GraphWriter(folder, TOWER, dialect=dialect) as writer:
        vit, side = Vit(writer, spec, weights, accuracy_level), spec.image_size
        pixels = writer.input("pixel_values", FLOAT, ["batch_size", "tiles", 3, side, side])
        shape: list[int | str] = ["features", spec.tokens, spec.output_size]
        features = writer.output("image_features", FLOAT, shape)
        table = weights.array(
            f"{spec.prefix}embeddings.position_embedding.weight",
            (spec.patches**2, spec.hidden_size),
        )
        placed = [vit.patches(pixels, bias=True), float_weight(writer, "positions", table)]
        stream = Stream(writer.node("Add", "embedded", placed))
        for layer in range(spec.layers):
            stream = vit.block(layer, stream)
        last, _ = vit.norm(f"{spec.prefix}post_layernorm", stream, last=True)
        scale = writer.weight("soft_norm.weight", unit_offset(weights, spec.norm, spec.hidden_size))
        pooled = Stream(_pooled(vit, spec, last))
        normed, _ = add_norm(writer, "soft_norm", pooled, [scale], spec.norm_eps)
        matrix = weights.matrix(spec.projection, spec.output_size, spec.hidden_size, turned=True)
        vit.multiply("projection", normed, matrix, output=features)
        return writer.finish()


def write_scaled_embedding(
    folder: Path, spec: Gemma3Decoder, weights: WeightSource, dialect: OpenDialect | None = None
) -> WrittenGraph:
    """Write ``embed_tokens.onnx`` as `graphs.embedding.write_embedding`, rows times ``hidden_size**0.5``.

    Raises `InputRefused` when the table is missing or of another shape.
    """
    with GraphWriter(folder, EMBEDDING, dialect=dialect) as writer:
        ids = writer.input("input_ids", INT64, ["batch_size", "sequence_length"])
        shape: list[int | str] = ["batch_size", "sequence_length", spec.hidden_size]
        out = writer.output("inputs_embeds", FLOAT, shape)
        table = weights.matrix(spec.embedding, spec.vocab_size, spec.hidden_size)
        rows = table_rows(writer, spec.embedding, table, ids, "rows")
        scale = writer.constant("scale", np.array(math.sqrt(spec.hidden_size), np.float32))
        writer.node("Mul", "scaled", [rows, scale], outputs=[out])
        return writer.finish()


def write_gemma3(
    folder: Path,
    spec: Gemma3Decoder,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.decoder.write_decoder`, and position_ids int64 [2, batch, sequence]:
    each position's place in its row's text, and the last place that it sees (its image's end, else its
    own). Places behind its own are seen only behind an empty past. Raises `InputRefused` when tensors
    are missing or of other shapes, or the attention op cannot do the head size.
    """
    check_heads(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


def unit_offset(weights: WeightSource, name: str, size: int) -> NDArray[np.float32]:
    """The scale of a norm whose checkpoint holds the difference from one."""
    return np.float32(1) + weights.vector(name, size)


def _pooled(vit: Vit, spec: PooledSiglip, x: str) -> str:
    """The mean of each square of ``pooled x pooled`` patches, ``[tiles, tokens, hidden]``."""
    side, square = spec.patches // spec.pooled, spec.pooled
    split = vit.reshape("squares", x, [-1, side, square, side, square, spec.hidden_size])
    axes = vit.writer.constant("squares.axes", np.array([2, 4], np.int64))
    mean = vit.writer.node("ReduceMean", "pooled", [split, axes], attributes={"keepdims": 0})
    return vit.reshape("pooled_rows", mean, [-1, spec.tokens, spec.hidden_size])


class _Positions:
    """What position_ids say in one graph: what turns queries and keys, and which keys are seen."""

    def __init__(self, writer: GraphWriter, spec: Gemma3Decoder) -> None:
        self._writer, self._spec = writer, spec
        shape: list[int | str] = [AXES, "batch_size", "sequence_length"]
        given = writer.input("position_ids", INT64, shape)
        numbers = (writer.constant(f"axis.{i}", np.array(i, np.int64)) for i in range(AXES))
        self.place, self.last = (
            writer.node("Gather", name, [given, number])
            for name, number in zip(("place", "last_seen"), numbers, strict=True)
        )
        rows, self._rows = (self._column(), "") if writer.dialect else self._numbered()
        kinds = {0: spec.full_rotary} | dict.fromkeys(
            (w for w in spec.windows if w), spec.sliding_rotary
        )
        self._turns = {
            window: AxisRotary(writer, rows, _radians(spec, kinds[window]), f"rotary.{window}")
            for window in sorted(set(spec.windows))
        }

    def turned(self, name: str, x: str, window: int, heads: int) -> str:
        """Heads ``[batch, sequence, heads * head_dim]`` turned as the layers of that window do."""
        return self._turns[window].turn(name, x, self._rows, heads)

    def reach(self, window: int) -> Reach:
        """Which keys a layer of that window sees."""
        return Reach(self.place, self.last, window)

    def _column(self) -> str:
        """Places ``[batch, sequence, 1]``."""
        axis = self._writer.constant("place.axis", np.array([-1], np.int64))
        return self._writer.node("Unsqueeze", "place_column", [self.place, axis])

    def _numbered(self) -> tuple[str, str]:
        """Places of all texts one after the other, ``[rows, 1]``, and the row of each, ``[batch, sequence]``."""
        writer = self._writer
        column = writer.constant("place.rows", np.array([-1, 1], np.int64))
        rows = writer.node("Reshape", "place_rows", [self.place, column])
        shape = writer.node("Shape", "place_shape", [self.place])
        count = writer.node("ReduceProd", "place_count", [shape], attributes={"keepdims": 0})
        zero, one = (writer.constant(f"axis.{i}", np.array(i, np.int64)) for i in range(AXES))
        numbers = writer.node("Range", "row_numbers", [zero, count, one])
        return rows, writer.node("Reshape", "row_of_place", [numbers, shape])


def _radians(spec: Gemma3Decoder, rotary: Rotary) -> NDArray[np.float32]:
    """Radians per place, ``[1, head_dim / 2]``; linear scaling divides places (arXiv 2306.15595)."""
    return (frequencies(spec.head_dim, rotary.theta) / np.float32(rotary.factor))[None]


class _Decoder:
    """Values are float32 ``[batch, sequence, hidden]``."""

    def __init__(
        self,
        writer: GraphWriter,
        spec: Gemma3Decoder,
        weights: WeightSource,
        options: DecoderOptions,
    ) -> None:
        self.writer, self.spec, self.apart = writer, spec, not options.fuse_mlp
        self.layers = Layers(writer, weights, options.accuracy_level, spec.norm_eps)
        self.shapes = spec.matrix_shapes()
        self.text = TextGraph(writer, spec)
        self.positions = _Positions(writer, spec)

    def build(self) -> None:
        spec, stream = self.spec, Stream(self.text.embeds)
        for layer in range(spec.layers):
            normed, residual = self._norm(layer, "input_layernorm", stream)
            attended = self._attention(layer, normed)
            attended = self.text.wanted(layer, "keep_attended", attended)
            residual = self.text.wanted(layer, "keep_residual", residual)
            added = self._product(layer, "self_attn.o_proj", attended)
            added, _ = self._norm(layer, "post_attention_layernorm", Stream(added))
            stream = Stream(residual, added)
            normed, residual = self._norm(layer, "pre_feedforward_layernorm", stream)
            added, _ = self._norm(
                layer, "post_feedforward_layernorm", Stream(self._mlp(layer, normed))
            )
            stream = Stream(residual, added)
        scale = self._scale("final_norm", spec.final_norm, spec.hidden_size)
        normed, _ = add_norm(self.writer, "final_norm", stream, [scale], spec.norm_eps, last=True)
        self.text.head(self.layers, normed)

    def _attention(self, layer: int, x: str) -> str:
        spec, name, window = self.spec, f"layers.{layer}", self.spec.windows[layer]
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        query, key, value = self._products(layer, f"{name}.qkv_proj", names, x)
        # Behind the norm the op's own factor is head_dim ** -0.5: the norm's scale has the rest.
        rest = math.sqrt(spec.head_dim / spec.query_scalar)
        query = self._head_norm(layer, "q_norm", query, spec.heads, rest)
        key = self._head_norm(layer, "k_norm", key, spec.kv_heads)
        query = self.positions.turned(f"{name}.q_rotary", query, window, spec.heads)
        key = self.positions.turned(f"{name}.k_rotary", key, window, spec.kv_heads)
        reach = self.positions.reach(window)
        return self.text.attention(layer, [query, key, value], reach=reach)

    def _mlp(self, layer: int, x: str) -> str:
        """The gated MLP, whose gate is GELU by tanh."""
        name, writer = f"layers.{layer}", self.writer
        names = ["mlp.gate_proj", "mlp.up_proj"]
        gate, up = self._products(layer, f"{name}.gate_up", names, x, apart=self.apart)
        active = writer.node("FastGelu", f"{name}.gelu", [gate], domain=MICROSOFT)
        return self._product(
            layer, "mlp.down_proj", writer.node("Mul", f"{name}.gated", [active, up])
        )

    def _products(
        self, layer: int, name: str, modules: list[str], x: str, *, apart: bool = False
    ) -> list[str]:
        """Products with several matrices of a block: one where they are of one format."""
        at = f"{self.spec.prefix}layers.{layer}."
        formats = {self.layers.weights.format(f"{at}{module}.weight") for module in modules}
        if apart or len(formats) > 1:
            return [self._product(layer, module, x) for module in modules]
        stacked = stack_rows([self._matrix(layer, module) for module in modules])
        packed = linear(self.writer, name, x, stacked, self.layers.accuracy_level)
        rows = np.array([self.shapes[module][0] for module in modules], np.int64)
        kind = name.rpartition(".")[2]
        parts = [f"{name}:{module}" for module in modules]
        inputs = [packed, self.writer.constant(f"{kind}.sizes", rows)]
        self.writer.node("Split", f"{name}/parts", inputs, outputs=parts, attributes={"axis": -1})
        return parts

    def _head_norm(self, layer: int, norm: str, x: str, heads: int, factor: float = 1.0) -> str:
        """Each head of `x` normed, and times `factor`."""
        spec, name = self.spec, f"layers.{layer}.{norm}"
        tensor = f"{spec.prefix}layers.{layer}.self_attn.{norm}.weight"
        scale = self._scale(name, tensor, spec.head_dim, factor)
        split = Stream(self._reshape(f"{name}/heads", x, [0, 0, heads, spec.head_dim]))
        normed, _ = add_norm(self.writer, name, split, [scale], spec.norm_eps)
        return self._reshape(f"{name}/joined", normed, [0, 0, heads * spec.head_dim])

    def _norm(self, layer: int, norm: str, x: Stream) -> tuple[str, str]:
        """The RMS norm `norm` of a block of the stream's sum, and that sum."""
        spec, name = self.spec, f"layers.{layer}.{norm}"
        scale = self._scale(name, f"{spec.prefix}{name}.weight", spec.hidden_size)
        return add_norm(self.writer, name, x, [scale], spec.norm_eps)

    def _scale(self, name: str, tensor: str, size: int, factor: float = 1.0) -> str:
        scale = np.float32(factor) * unit_offset(self.layers.weights, tensor, size)
        return self.writer.weight(f"{name}.weight", scale)

    def _product(self, layer: int, module: str, x: str) -> str:
        matrix, name = self._matrix(layer, module), f"layers.{layer}.{module}"
        return linear(self.writer, name, x, matrix, self.layers.accuracy_level)

    def _matrix(self, layer: int, module: str) -> Matrix:
        tensor = f"{self.spec.prefix}layers.{layer}.{module}.weight"
        return self.layers.weights.matrix(tensor, *self.shapes[module])

    def _reshape(self, name: str, x: str, shape: list[int]) -> str:
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])
