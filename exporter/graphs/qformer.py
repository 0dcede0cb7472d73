"""BLIP-2's vision part as one ONNX graph: EVA tower, Q-Former, projection to the decoder's width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.blip2_vision import Blip2Vision, QFormer
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Projection, Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.tower import NAME
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_blip2_vision(
    folder: Path,
    spec: Blip2Vision,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] (one tile for each image) ->
    image_features float32 [batch * tiles, queries, output_size]. Raises `InputRefused` when tensors
    are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        vit, side = Vit(writer, spec.tower, weights, accuracy_level), spec.tower.image_size
        shape: list[int | str] = ["batch_size", "tiles", 3, side, side]
        pixels = writer.input("pixel_values", TensorProto.FLOAT, shape)
        shape = ["features", spec.tokens, spec.output_size]
        features = writer.output("image_features", TensorProto.FLOAT, shape)
        queries = _QFormer(vit, spec.qformer).build(
            spec.query_tokens, eva_states(vit, spec, pixels)
        )
        size = (spec.output_size, spec.qformer.hidden_size)
        product = vit.product("projection", spec.projection, queries, size)
        writer.node("Add", "projected", list(product), outputs=[features])
        return writer.finish()


def eva_states(vit: Vit, spec: Blip2Vision, pixels: str) -> str:
    """Hidden states ``[tiles, 1 + patches, hidden]`` of the tower, behind its last norm."""
    writer, tower = vit.writer, spec.tower
    at = f"{tower.prefix}embeddings."
    table = vit.weights.array(f"{at}position_embedding", (1, spec.rows, tower.hidden_size))
    token = vit.weights.array(f"{at}class_embedding", (1, 1, tower.hidden_size))
    first = token.astype(np.float32) + table[:, :1].astype(np.float32)
    rows = vit.behind_token(
        vit.patches(pixels, bias=True),
        float_weight(writer, "positions", table[:, 1:]),
        writer.weight("class_token", first),
    )
    stream = Stream(rows)
    for layer in range(tower.layers):
        stream = vit.block(layer, stream)
    return vit.norm(f"{tower.prefix}post_layernorm", stream, last=True)[0]


class _QFormer:
    """Writes the blocks of a Q-Former; values are float32 ``[tiles, queries, hidden]``."""

    def __init__(self, vit: Vit, spec: QFormer) -> None:
        self.spec = spec
        # A tower's pieces in other sizes.
        sizes = replace(
            vit.spec,
            hidden_size=spec.hidden_size,
            heads=spec.heads,
            norm_eps=spec.norm_eps,
            prefix="",
        )
        self.ops = Vit(vit.writer, sizes, vit.weights, vit.accuracy_level)

    def build(self, query_tokens: str, states: str) -> str:
        """The queries of each image behind all blocks; `states` ``[tiles, rows, image width]``."""
        spec, ops = self.spec, self.ops
        x = self._queries(query_tokens, states)
        for layer in range(spec.layers):
            at = spec.block(layer)
            for name, width in spec.attentions(layer).items():
                source = states if name == "crossattention" else x
                x = self._attention(f"{at}{name}.", x, source, width)
            wide = self._product(f"{at}intermediate_query.dense", x, spec.intermediate_size)
            active = ops.activate(f"{at}gelu", spec.activation, *wide)
            size = (spec.hidden_size, spec.intermediate_size)
            product = ops.product(f"{at}output_query", f"{at}output_query.dense", active, size)
            x, _ = ops.norm(f"{at}output_query.LayerNorm", Stream(x, *product), last=True)
        return x

    def _queries(self, query_tokens: str, states: str) -> str:
        """The learned queries behind their norm, once for each image."""
        spec, writer = self.spec, self.ops.writer
        stored = self.ops.weights.array(query_tokens, (1, spec.queries, spec.hidden_size))
        learned = float_weight(writer, "query_tokens", stored)
        normed, _ = self.ops.norm(f"{spec.prefix}layernorm", Stream(learned))
        count = writer.node("Shape", "image_count", [states], attributes={"start": 0, "end": 1})
        ones = writer.constant("queries.ones", np.array([1, 1], np.int64))
        shape = writer.node("Concat", "queries.shape", [count, ones], attributes={"axis": 0})
        return writer.node("Expand", "queries", [normed, shape])

    def _attention(self, at: str, x: str, source: str, width: int) -> str:
        """Attention of `x` to `source` (rows of `width`), added to `x`, behind its norm."""
        hidden, parts = self.spec.hidden_size, []
        for part, seen in (("query", x), ("key", source), ("value", source)):
            name = f"{at}attention.{part}"
            shape = (hidden, hidden if part == "query" else width)
            parts.append(Projection(name, seen, shape, name))
        values, bias = self.ops.layers.projected(f"{at}attention.bias", parts)
        attended = self.ops.attend(at.removesuffix("."), values, bias)
        product = self._product(f"{at}output.dense", attended, hidden)
        return self.ops.norm(f"{at}output.LayerNorm", Stream(x, *product), last=True)[0]

    def _product(self, tensor: str, x: str, outputs: int) -> tuple[str, str]:
        """Product of rows of the Q-Former's width with a matrix, and its bias, still to be added."""
        return self.ops.product(tensor, tensor, x, (outputs, self.spec.hidden_size))
