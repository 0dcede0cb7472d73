"""OPT as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.families.specs.opt import NORM_EPS, POSITION_OFFSET, OptSpec
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Layers, Stream
from exporter.graphs.linear import linear
from exporter.graphs.matrices import stack_rows
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")


def write_opt(
    folder: Path,
    spec: OptSpec,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.decoder.write_decoder`. Raises `InputRefused` when tensors are
    missing or of other shapes, or the attention op cannot do the head size.
    """
    check_heads(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


class _Decoder:
    """Values are float32 ``[batch, sequence, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: OptSpec, weights: WeightSource, options: DecoderOptions
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.text = TextGraph(writer, spec)
        level = options.accuracy_level
        self.layers = Layers(writer, weights, level, NORM_EPS, (spec.prefix,))

    def build(self) -> None:
        spec = self.spec
        rows = POSITION_OFFSET + spec.max_positions
        table = self.weights.array(spec.positions, (rows, spec.hidden_size))
        stream = Stream(self.text.placed(table[POSITION_OFFSET:]))
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        last = f"{spec.prefix}final_layer_norm"
        normed, _ = self.layers.norm(last, stream, spec.hidden_size, last=True)
        self.text.head(self.layers, normed)

    def _block(self, layer: int, x: Stream) -> Stream:
        at, name, size = self.spec.block(layer), f"layers.{layer}", self.spec.hidden_size
        normed, residual = self.layers.norm(f"{at}self_attn_layer_norm", x, size)
        attended = self.text.attention(layer, [self._packed(layer, normed), "", ""])
        attended = self.text.wanted(layer, "keep_attended", attended)
        residual = self.text.wanted(layer, "keep_residual", residual)
        x = Stream(residual, *self._product(layer, "self_attn.out_proj", attended))
        normed, residual = self.layers.norm(f"{at}final_layer_norm", x, size)
        wide = self.writer.node("Add", f"{name}.fc1/add", list(self._product(layer, "fc1", normed)))
        active = self.writer.node("Relu", f"{name}.relu", [wide])
        return Stream(residual, *self._product(layer, "fc2", active))

    def _packed(self, layer: int, x: str) -> str:
        """Queries, keys and values behind each other, biases added."""
        at, name, size = self.spec.block(layer), f"layers.{layer}.qkv", self.spec.hidden_size
        parts = [self.weights.matrix(f"{at}{module}.weight", size, size) for module in QKV]
        product = linear(self.writer, name, x, stack_rows(parts), self.layers.accuracy_level)
        biases = [self.weights.vector(f"{at}{module}.bias", size) for module in QKV]
        bias = self.writer.weight(f"{name}.bias", np.concatenate(biases))
        return self.writer.node("Add", f"{name}/bias", [product, bias])

    def _product(self, layer: int, module: str, x: str) -> tuple[str, str]:
        """Product with a linear layer of a block, and its bias, still to be added."""
        shape = self.spec.matrix_shapes()[module]
        return self.layers.product(self.spec.block(layer) + module, x, shape)
