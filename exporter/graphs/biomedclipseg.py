"""BiomedCLIPSeg's image tower as an ONNX graph; its mask decoder is CLIPSeg's, its text half BiomedCLIP's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.biomedclipseg import TimmStates
from exporter.graphs.clipseg import give_states
from exporter.graphs.linear import float_weight
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_timm_states(
    folder: Path, name: str, spec: TimmStates, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> activations.{i} float32
    [images, 1 + patches, hidden] for each block whose states are read. Raises `InputRefused` when
    tensors are missing or of other shapes.
    """
    tower, side = spec.image.tower, spec.image.tower.image_size
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", 3, side, side])
        table = weights.array(f"{tower.prefix}pos_embed", (1, spec.image.rows, tower.hidden_size))
        token = weights.array(f"{tower.prefix}cls_token", (1, 1, tower.hidden_size))
        first = token.astype(np.float32) + table[:, :1].astype(np.float32)
        rows = vit.patches(pixels, bias=True)
        positions = float_weight(writer, "positions", table[:, 1:])
        x = vit.behind_token(rows, positions, writer.weight("class_token", first))
        give_states(vit, x, spec.used_layers, dict(zip(spec.read, spec.outputs(), strict=True)))
        return writer.finish()
