"""The SigLIP tower with pixel shuffle and projection as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.families.base import TowerSpec
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

NAME = "vision_encoder"


def position_ids(patches: int) -> NDArray[np.int64]:
    """Rows of the position table for a full tile of ``patches x patches``, as Idefics3 computes them.

    Idefics3VisionEmbeddings sorts the patches' fractional coordinates among boundaries, both in
    float32. For some grids (19, 25, 29, 31 of the first 36) rounding puts a patch into its
    neighbour's bucket, and a model of that grid was trained so.
    """
    places = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    places = np.minimum(places, np.float32(1.0 - 1e-6))
    buckets = np.searchsorted(_boundaries(patches), places, side="right").astype(np.int64)
    rows: NDArray[np.int64] = buckets[:, None] * patches + buckets[None, :]
    return rows.reshape(-1)


def _boundaries(patches: int) -> NDArray[np.float32]:
    # torch.arange(1/n, 1, 1/n) in float32 on a CPU with 8 lanes: two vectors at a time, whose first
    # value is rounded before the multiples are added; the rest one by one. (With 16 lanes torch
    # itself gives other buckets for the grids 19, 25, 29 and some above 37; not for 27 or 32.)
    lanes, step = 8, 1 / patches
    index = np.arange(math.ceil((1.0 - step) / step))
    exact = step + step * index
    lane = index % lanes
    first = (step + step * (index - lane)).astype(np.float32).astype(np.float64)
    vectors = index < len(index) // (2 * lanes) * (2 * lanes)
    return np.where(vectors, first + lane * step, exact).astype(np.float32)


def write_tower(
    folder: Path,
    spec: TowerSpec,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] -> image_features float32
    [batch * tiles, tokens, output_size]. Raises `InputRefused` when tensors are missing or of
    other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        build_tower(Vit(writer, spec, weights, accuracy_level), spec)
        return writer.finish()


def build_tower(vit: Vit, spec: TowerSpec) -> None:
    """Inputs, outputs and nodes of the tower's graph, in the ops that `vit` has; see `write_tower`."""
    writer, side = vit.writer, spec.image_size
    pixels = writer.input("pixel_values", TensorProto.FLOAT, ["batch_size", "tiles", 3, side, side])
    features = writer.output(
        "image_features", TensorProto.FLOAT, ["features", spec.tokens, spec.output_size]
    )
    stream = Stream(_embed(vit, spec, pixels))
    for layer in range(spec.layers):
        stream = vit.block(layer, stream)
    last, _ = vit.norm(f"{spec.prefix}post_layernorm", stream, last=True)
    shuffled = _shuffle(vit, spec, last)
    shape = (spec.output_size, spec.hidden_size * spec.shuffle**2)
    matrix = vit.weights.matrix(spec.projection, *shape)
    vit.multiply("projection", shuffled, matrix, output=features)


def _embed(vit: Vit, spec: TowerSpec, pixels: str) -> str:
    rows = vit.patches(pixels, bias=True)
    shape = (spec.patches**2, spec.hidden_size)
    table = vit.weights.array(f"{spec.prefix}embeddings.position_embedding.weight", shape)
    placed = float_weight(vit.writer, "positions", table[position_ids(spec.patches)])
    return vit.writer.node("Add", "embedded", [rows, placed])


def _shuffle(vit: Vit, spec: TowerSpec, x: str) -> str:
    """Each square of ``shuffle x shuffle`` patches becomes one row, row by row within it."""
    s, side = spec.shuffle, spec.patches // spec.shuffle
    split = vit.reshape("shuffle_split", x, [-1, side, s, side, s * spec.hidden_size])
    turn = {"perm": [0, 1, 3, 2, 4]}
    turned = vit.writer.node("Transpose", "shuffle_turn", [split], attributes=turn)
    return vit.reshape("shuffled", turned, [-1, spec.tokens, s * s * spec.hidden_size])
