"""The image half of a CLIP with MedBridge's plug-in as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.task_models.medbridge import PREFIX, BridgedImage
from exporter.graphs.clip_tower import clip_states
from exporter.graphs.layers import Projection, Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_bridged_image(
    folder: Path, name: str, spec: BridgedImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, views, 3, image_size, image_size] -> image_embeds float32
    [images, output_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    tower, size = spec.clip.tower, spec.clip.output_size
    side, views = tower.image_size, spec.windows.views
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", views, 3, side, side])
        embeds = writer.output("image_embeds", TensorProto.FLOAT, ["images", size])
        states = clip_states(vit, tower, pixels)
        added = _Bridge(Vit(writer, spec.block, weights, accuracy_level), spec).build(states)
        summary = Stream(_class_row(vit, spec, states), *added)
        normed, _ = vit.norm(f"{tower.prefix}post_layernorm", summary, last=True)
        matrix = weights.matrix(spec.clip.projection, size, tower.hidden_size)
        vit.multiply("projection", normed, matrix, output=embeds)
        return writer.finish()


def _class_row(vit: Vit, spec: BridgedImage, states: str) -> str:
    """The class token's state in each image's first view, ``[images, hidden]``."""
    tower = spec.clip.tower
    rows = vit.reshape(
        "image_rows", states, [-1, spec.windows.views * tower.rows, tower.hidden_size]
    )
    first = vit.writer.constant("class_token.row", np.array([0], np.int64))
    row = vit.writer.node("Gather", "class_row", [rows, first], attributes={"axis": 1})
    return vit.reshape("summary", row, [-1, tower.hidden_size])


class _Bridge:
    """Writes the plug-in; queries are float32 ``[images, views * queries, hidden]``."""

    def __init__(self, ops: Vit, spec: BridgedImage) -> None:
        self.ops, self.spec, self.hidden = ops, spec, spec.block.hidden_size
        self.rows = spec.windows.views * spec.queries

    def build(self, states: str) -> tuple[str, str]:
        """What is added to each image's class token, and its bias, still to be added to it."""
        spec, ops, writer = self.spec, self.ops, self.ops.writer
        features, _ = ops.norm(f"{PREFIX}features_norm", Stream(states))
        x = Stream(self._queries(states))
        for layer in range(spec.block.layers):
            x = self._layer(f"{PREFIX}layers.{layer}.", x, features)
        normed, _ = ops.norm(f"{PREFIX}final_norm", x, last=True)
        views = [-1, spec.windows.views, spec.queries, self.hidden]
        pooled = ops.reshape(f"{PREFIX}views", normed, views)
        axis = writer.constant(f"{PREFIX}axis", np.array([1], np.int64))
        for op in ("ReduceMax", "ReduceMean"):
            pooled = writer.node(op, f"{PREFIX}{op}", [pooled, axis], attributes={"keepdims": 0})
        return ops.product(f"{PREFIX}projection", f"{PREFIX}projection", pooled)

    def _queries(self, states: str) -> str:
        """The learned queries, once for each view."""
        writer = self.ops.writer
        stored = self.ops.weights.array(f"{PREFIX}queries", (self.spec.queries, self.hidden))
        learned = float_weight(writer, f"{PREFIX}queries", stored[None])
        count = writer.node("Shape", "view_count", [states], attributes={"start": 0, "end": 1})
        ones = writer.constant(f"{PREFIX}ones", np.array([1, 1], np.int64))
        shape = writer.node("Concat", f"{PREFIX}shape", [count, ones], attributes={"axis": 0})
        each = writer.node("Expand", f"{PREFIX}each", [learned, shape])
        return self.ops.reshape(f"{PREFIX}first", each, [-1, self.rows, self.hidden])

    def _layer(self, at: str, x: Stream, features: str) -> Stream:
        ops, inner = self.ops, self.spec.block.intermediate_size
        normed, residual = ops.norm(f"{at}cross_attn_norm", x)
        # A query sees its own view alone: views become rows of the batch.
        alone = ops.reshape(f"{at}alone", normed, [-1, self.spec.queries, self.hidden])
        seen, bias = self._attention(f"{at}cross_attn.", alone, features)
        together = ops.reshape(f"{at}together", seen, [-1, self.rows, self.hidden])
        normed, residual = ops.norm(f"{at}self_attn_norm", Stream(residual, together, bias))
        attended = self._attention(f"{at}self_attn.", normed, normed)
        normed, residual = ops.norm(f"{at}mlp_norm", Stream(residual, *attended))
        wide = ops.product(f"{at}fc1", f"{at}mlp.fc1", normed, (inner, self.hidden))
        active = ops.activate(f"{at}gelu", self.spec.block.activation, *wide)
        return Stream(
            residual, *ops.product(f"{at}fc2", f"{at}mlp.fc2", active, (self.hidden, inner))
        )

    def _attention(self, at: str, x: str, source: str) -> tuple[str, str]:
        """Product of what `x` finds in `source`, and its bias, still to be added."""
        ops, shape = self.ops, (self.hidden, self.hidden)
        parts = [
            Projection(f"{at}{part}_proj", seen, shape, f"{at}{part}_proj")
            for part, seen in (("q", x), ("k", source), ("v", source))
        ]
        attended = ops.attend(at.removesuffix("."), *ops.layers.projected(f"{at}bias", parts))
        return ops.product(f"{at}out_proj", f"{at}out_proj", attended)
