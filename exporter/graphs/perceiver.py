"""IDEFICS' vision part as one ONNX graph: CLIP tower, perceiver resampler, keys and values of gated blocks.

The images of a text do not change while it is decoded: what the gated blocks make of them is computed
here, once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.idefics import ResampledVision
from exporter.graphs.attention import attention
from exporter.graphs.clip_tower import clip_states
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.tower import NAME
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

# The resampler's norms have torch's default, whatever config.json says of the others.
NORM_EPS = 1e-5


def write_resampled_vision(
    folder: Path,
    spec: ResampledVision,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, images, 3, image_size, image_size] -> cross_key_values.{i}.key|value
    float32 [batch, heads, images * latents, head_dim] for each gated block i of the decoder.
    Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        vit = Vit(writer, spec.tower, weights, accuracy_level)
        side = spec.tower.image_size
        shape: list[int | str] = ["batch_size", "images", 3, side, side]
        pixels = writer.input("pixel_values", TensorProto.FLOAT, shape)
        states = clip_states(vit, spec.tower, pixels)
        resampler = _Resampler(vit, spec)
        rows = resampler.resampled(states)
        for block in range(spec.decoder.gated_blocks):
            resampler.keys_and_values(block, resampler.by_text(pixels, rows))
        return writer.finish()


class _Resampler:
    """Writes the pieces behind the tower; values are float32 ``[images, rows, width]``."""

    def __init__(self, vit: Vit, spec: ResampledVision) -> None:
        self.vit, self.writer, self.weights = vit, vit.writer, vit.weights
        self.spec, self.perceiver, self.decoder = spec, spec.perceiver, spec.decoder
        self.texts = ""

    def resampled(self, states: str) -> str:
        """The latents of each image behind all blocks, ``[images, latents, width]``."""
        p, writer = self.perceiver, self.writer
        stored = self.weights.array(f"{p.prefix}latents", (p.latents, p.width))
        count = writer.node("Shape", "image_count", [states], attributes={"start": 0, "end": 1})
        ones = writer.constant("latents.ones", np.array([1, 1], np.int64))
        shape = writer.node("Concat", "latents.shape", [count, ones], attributes={"axis": 0})
        learned = float_weight(writer, "latents.weight", stored[None])
        x = writer.node("Expand", "latents", [learned, shape])
        for block in range(p.depth):
            name, at = f"resampler.{block}", f"{p.prefix}blocks.{block}."
            attended = self._attention(name, f"{at}0.", states, x)
            x = writer.node("Add", f"{name}.attended", [attended, x])
            normed = self._norm(f"{name}.ln", f"{at}1.ln", x, p.width)
            wide = self._product(f"{name}.fc", f"{at}1.fc", normed, p.inner, p.width)
            active = writer.node("Relu", f"{name}.relu", [wide])
            narrow = self._product(f"{name}.c_proj", f"{at}1.c_proj", active, p.width, p.inner)
            x = writer.node("Add", f"{name}.sum", [narrow, x])
        return self._norm("resampler.norm", f"{p.prefix}layer_norm", x, p.width)

    def by_text(self, pixels: str, rows: str) -> str:
        """The rows of all images of a text behind each other, ``[batch, images * latents, width]``."""
        if not self.texts:
            writer, ends = self.writer, {"start": 0, "end": 1}
            batch = writer.node("Shape", "text_count", [pixels], attributes=ends)
            rest = writer.constant("text_rows.rest", np.array([-1, self.perceiver.width], np.int64))
            shape = writer.node("Concat", "text_rows.shape", [batch, rest], attributes={"axis": 0})
            self.texts = writer.node("Reshape", "text_rows", [rows, shape])
        return self.texts

    def keys_and_values(self, block: int, rows: str) -> None:
        """The two outputs of a gated block, heads before rows."""
        writer, d = self.writer, self.decoder
        at = f"{d.gated(block)}cross_attn."
        for part, output in (("k", "key"), ("v", "value")):
            name = f"cross_key_values.{block}.{output}"
            shape: list[int | str] = ["batch_size", d.heads, "image_rows", d.head_dim]
            writer.output(name, TensorProto.FLOAT, shape)
            x = self._product(
                f"{name}/product", f"{at}{part}_proj", rows, d.hidden_size, d.image_width
            )
            x = self.vit.reshape(f"{name}/heads", x, [0, 0, d.heads, d.head_dim])
            if part == "k" and d.qk_norms:
                scale = self.weights.vector(f"{at}k_layer_norm.weight", d.head_dim)
                x = writer.node(
                    "SimplifiedLayerNormalization",
                    f"{name}/norm",
                    [x, writer.weight(f"{name}/norm.weight", scale)],
                    attributes={"epsilon": d.llama.norm_eps, "axis": -1},
                )
            perm = {"perm": [0, 2, 1, 3]}
            writer.node("Transpose", f"{name}/turn", [x], outputs=[name], attributes=perm)

    def _attention(self, name: str, at: str, states: str, latents: str) -> str:
        """The latents look at an image's rows and at themselves."""
        p, writer = self.perceiver, self.writer
        inside = p.heads * p.head_dim
        context = self._norm(f"{name}.context_norm", f"{at}context_layer_norm", states, p.width)
        own = self._norm(f"{name}.latents_norm", f"{at}latents_layer_norm", latents, p.width)
        both = writer.node("Concat", f"{name}.both", [context, own], attributes={"axis": 1})
        sources = {"q": own, "k": both, "v": both}
        parts = {
            part: self._product(f"{name}.{part}_proj", f"{at}{part}_proj", x, inside, p.width)
            for part, x in sources.items()
        }
        for part in "qk" if p.qk_norms else "":
            heads = self.vit.reshape(
                f"{name}.{part}_heads", parts[part], [0, 0, p.heads, p.head_dim]
            )
            normed = self._norm(f"{name}.{part}_norm", f"{at}{part}_layer_norm", heads, p.head_dim)
            parts[part] = self.vit.reshape(f"{name}.{part}", normed, [0, 0, inside])
        inputs = list(parts.values())
        attended = attention(writer, f"{name}.attention", inputs, p.heads, p.head_dim)
        return self._product(f"{name}.output_proj", f"{at}output_proj", attended, p.width, inside)

    def _norm(self, name: str, tensor: str, x: str, size: int) -> str:
        """Layer norm over the last axis."""
        parts = [
            self.writer.weight(f"{name}.{p}", self.weights.vector(f"{tensor}.{p}", size))
            for p in ("weight", "bias")
        ]
        attributes = {"epsilon": NORM_EPS, "axis": -1}
        return self.writer.node("LayerNormalization", name, [x, *parts], attributes=attributes)

    def _product(self, name: str, tensor: str, x: str, rows: int, columns: int) -> str:
        matrix = self.weights.matrix(f"{tensor}.weight", rows, columns)
        return linear(self.writer, name, x, matrix, self.vit.accuracy_level)
