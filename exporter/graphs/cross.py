"""The ViT encoder with every decoder layer's cross keys and values as one ONNX graph.

A caption's image does not change while it is decoded: what the decoder's cross-attention makes of it
is computed here, once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.gpt2 import cross_names
from exporter.families.specs.vit_tower import CrossVit
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Stream
from exporter.graphs.linear import linear
from exporter.graphs.tower import NAME
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_cross_vit(
    folder: Path,
    spec: CrossVit,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] (one tile for each image) ->
    cross_key_values.{i}.key|value float32 [batch * tiles, heads, rows, head_dim] for each block i of
    the decoder. Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        vit = Vit(writer, spec.tower, weights, accuracy_level)
        side = spec.tower.image_size
        shape: list[int | str] = ["batch_size", "tiles", 3, side, side]
        pixels = writer.input("pixel_values", TensorProto.FLOAT, shape)
        at = f"{spec.tower.prefix}embeddings."
        stream = Stream(
            vit.class_token_and_patches(f"{at}cls_token", f"{at}position_embeddings", pixels)
        )
        for layer in range(spec.tower.layers):
            stream = vit.block(layer, stream)
        rows, _ = vit.norm(f"{spec.tower.prefix}layernorm", stream, last=True)
        if spec.projection:
            size = (spec.output_size, spec.tower.hidden_size)
            product = vit.product("projection", spec.projection, rows, size)
            rows = writer.node("Add", "projected", list(product))
        for layer in range(spec.decoder.layers):
            _keys_and_values(vit, spec, rows, layer)
        return writer.finish()


def _keys_and_values(vit: Vit, spec: CrossVit, rows: str, layer: int) -> None:
    """What one block of the decoder makes of the rows."""
    writer, decoder = vit.writer, spec.decoder
    name, tensor = f"cross.{layer}", decoder.cross_layer(layer)
    width = decoder.hidden_size
    matrix = vit.weights.matrix(f"{tensor}.weight", 2 * width, width, turned=True)
    product = linear(writer, name, rows, matrix, vit.accuracy_level)
    bias = writer.weight(f"{name}.bias", vit.weights.vector(f"{tensor}.bias", 2 * width))
    both = writer.node("Add", f"{name}/bias", [product, bias])
    write_cross_outputs(writer, decoder, spec.rows, layer, both)


def write_cross_outputs(
    writer: GraphWriter, decoder: TextDecoder, rows: int, layer: int, both: str
) -> None:
    """Keys and values ``[images, rows, 2 * hidden]`` as the graph's outputs for one decoder layer, in the
    layout of its attention op.
    """
    name, width = f"cross.{layer}", decoder.head_dim
    split = writer.constant(
        "cross.heads.shape", np.array([0, 0, 2 * decoder.heads, width], np.int64)
    )
    heads = writer.node("Reshape", f"{name}.heads", [both, split])
    turned = writer.node("Transpose", f"{name}.turn", [heads], attributes={"perm": [0, 2, 1, 3]})
    shape: list[int | str] = ["images", decoder.heads, rows, width]
    outputs = [
        writer.output(output, TensorProto.FLOAT, shape)
        for output in cross_names(decoder.layers)[2 * layer : 2 * layer + 2]
    ]
    halves = {"axis": 1, "num_outputs": 2}
    writer.node("Split", f"{name}.parts", [turned], outputs=outputs, attributes=halves)
