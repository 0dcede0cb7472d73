"""The Phi decoder as an ONNX graph of onnxruntime's fused ops, its first positions seen both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.phi import PhiSpec
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Layers, Stream
from exporter.graphs.rotary import rotary_tables
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph


def write_phi(
    folder: Path,
    spec: PhiSpec,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.decoder.write_decoder`, and prefix_length int64 scalar: so many of
    the first positions of this run see each other both ways (0 behind a past). GroupQueryAttention
    looks back only: it keeps the cache and gives the later rows, and the first ones are computed by
    attention without a mask among themselves. Raises `InputRefused` when tensors are missing or of
    other shapes, or the attention op cannot do the head size.
    """
    check_heads(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


class _Decoder:
    """Values are float32 ``[batch, sequence, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: PhiSpec, weights: WeightSource, options: DecoderOptions
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.text = TextGraph(writer, spec)
        level = options.accuracy_level
        self.layers = Layers(writer, weights, level, spec.norm_eps, (spec.prefix,))
        self.places = self.text.places()
        cos, sin = rotary_tables(spec.max_positions, spec.rotary_dim, spec.rope_theta)
        self.tables = [writer.weight("rotary.cos", cos), writer.weight("rotary.sin", sin)]
        prefix = writer.input("prefix_length", TensorProto.INT64, [])
        one = writer.constant("prefix.shape", np.array([1], np.int64))
        self.prefix = writer.node("Reshape", "prefix", [prefix, one])

    def build(self) -> None:
        spec, layers, stream = self.spec, self.layers, Stream(self.text.embeds)
        for layer in range(spec.layers):
            norm = f"{spec.prefix}blocks.{layer}.ln"
            normed, residual = layers.norm(norm, stream, spec.hidden_size)
            attended = self._attention(layer, normed)
            attended = self.text.wanted(layer, "keep_attended", attended)
            residual = self.text.wanted(layer, "keep_residual", residual)
            normed = self.text.wanted(layer, "keep_normed", normed)
            stream = Stream(residual, self._added(layer, normed, attended))
        normed, _ = layers.norm(spec.final_norm, stream, spec.hidden_size, last=True)
        tensor = spec.head.removesuffix(".weight")
        head = layers.product(tensor, normed, (spec.vocab_size, spec.hidden_size), name="head")
        self.writer.node("Add", "head/bias", list(head), outputs=[self.text.logits])

    def _added(self, layer: int, normed: str, attended: str) -> str:
        """What a block adds to the residual: attention and MLP of the same normed values."""
        name = f"blocks.{layer}"
        first = self._product(layer, "attn.proj", attended)
        second = self._product(layer, "mlp.fc2", self._active(layer, normed))
        attention = self.writer.node("Add", f"{name}.attention/bias", list(first))
        mlp = self.writer.node("Add", f"{name}.mlp/bias", list(second))
        return self.writer.node("Add", f"{name}.added", [attention, mlp])

    def _active(self, layer: int, normed: str) -> str:
        product = self._product(layer, "mlp.fc1", normed)
        name = f"blocks.{layer}.mlp.gelu"
        return self.writer.node("FastGelu", name, list(product), domain=MICROSOFT)

    def _attention(self, layer: int, x: str) -> str:
        """Causal attention, in which the first positions see each other both ways."""
        return self.text.attention(layer, self._queries(layer, x), prefix=self.prefix)

    def _queries(self, layer: int, x: str) -> list[str]:
        """Queries and keys, turned by their places, and values."""
        name, writer = f"blocks.{layer}.qkv", self.writer
        packed = writer.node("Add", f"{name}/bias", list(self._product(layer, "attn.qkv", x)))
        parts = [f"{name}:{part}" for part in "qkv"]
        thirds = {"axis": -1, "num_outputs": 3}
        writer.node("Split", name, [packed], outputs=parts, attributes=thirds)
        return [*(self._turned(part) for part in parts[:2]), parts[2]]

    def _turned(self, x: str) -> str:
        """The first `rotary_dim` values of each head turned by the position (RoFormer, arXiv 2104.09864)."""
        if self.writer.dialect is not None:
            turns = self.writer.dialect.looked_up(self.tables, self.places)
            sizes = (self.spec.head_dim, self.spec.rotary_dim)
            return self.writer.dialect.turned(f"{x}/turned", x, turns, self.spec.heads, sizes)
        attributes = {
            "interleaved": 0,
            "num_heads": self.spec.heads,
            "rotary_embedding_dim": self.spec.rotary_dim,
        }
        return self.writer.node(
            "RotaryEmbedding",
            f"{x}/turned",
            [x, self.places, *self.tables],
            domain=MICROSOFT,
            attributes=attributes,
        )

    def _product(self, layer: int, module: str, x: str) -> tuple[str, str]:
        """Product with a linear layer of a block, and its bias, still to be added."""
        shape = self.spec.matrix_shapes()[module]
        return self.layers.product(f"{self.spec.prefix}blocks.{layer}.{module}", x, shape)
