"""OPT as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.families.specs.opt import NORM_EPS, POSITION_OFFSET, OptSpec
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import linear
from exporter.graphs.matrices import stack_rows
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.vit import Stream
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

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
        self.accuracy_level = options.accuracy_level
        self.text = TextGraph(writer, spec)

    def build(self) -> None:
        spec, logits = self.spec, self.text.logits
        rows = POSITION_OFFSET + spec.max_positions
        table = self.weights.array(spec.positions, (rows, spec.hidden_size))
        stream = Stream(self.text.placed(table[POSITION_OFFSET:]))
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        normed, _ = self._norm(f"{spec.prefix}final_layer_norm", stream, last=True)
        shared = spec.tied and not self.weights.has(spec.head)
        name = spec.embedding if shared else spec.head
        head = self.weights.matrix(name, spec.vocab_size, spec.hidden_size, again=shared)
        linear(self.writer, "head", normed, head, self.accuracy_level, output=logits)

    def _block(self, layer: int, x: Stream) -> Stream:
        at, name = self.spec.block(layer), f"layers.{layer}"
        normed, residual = self._norm(f"{at}self_attn_layer_norm", x)
        attended = self.text.attention(layer, [self._packed(layer, normed), "", ""])
        if layer == self.spec.layers - 1:
            # Behind the last attention no position needs another: drop those nobody asked for.
            attended = self.text.keep("keep_attended", attended)
            residual = self.text.keep("keep_residual", residual)
        x = Stream(residual, *self._product(layer, "self_attn.out_proj", attended))
        normed, residual = self._norm(f"{at}final_layer_norm", x)
        wide = self.writer.node("Add", f"{name}.fc1/add", list(self._product(layer, "fc1", normed)))
        active = self.writer.node("Relu", f"{name}.relu", [wide])
        return Stream(residual, *self._product(layer, "fc2", active))

    def _packed(self, layer: int, x: str) -> str:
        """Queries, keys and values behind each other, biases added."""
        at, name, size = self.spec.block(layer), f"layers.{layer}.qkv", self.spec.hidden_size
        parts = [self.weights.matrix(f"{at}{module}.weight", size, size) for module in QKV]
        product = linear(self.writer, name, x, stack_rows(parts), self.accuracy_level)
        biases = [self.weights.vector(f"{at}{module}.bias", size) for module in QKV]
        bias = self.writer.weight(f"{name}.bias", np.concatenate(biases))
        return self.writer.node("Add", f"{name}/bias", [product, bias])

    def _norm(self, tensor: str, x: Stream, *, last: bool = False) -> tuple[str, str]:
        """Layer norm of the stream's sum, and that sum (which the `last` norm does not give)."""
        name, size = tensor.removeprefix(self.spec.prefix), self.spec.hidden_size
        vectors = [self._vector(f"{tensor}.{part}", size) for part in ("weight", "bias")]
        epsilon = {"epsilon": NORM_EPS}
        if not x.addition:
            attributes = {**epsilon, "axis": -1}
            inputs = [x.residual, *vectors]
            normed = self.writer.node("LayerNormalization", name, inputs, attributes=attributes)
            return normed, x.residual
        outputs = [f"{name}:0", *([] if last else ["", "", f"{name}:sum"])]
        self.writer.node(
            "SkipLayerNormalization",
            name,
            [x.residual, x.addition, *vectors, x.bias],
            domain=MICROSOFT,
            outputs=outputs,
            attributes=epsilon,
        )
        return outputs[0], outputs[-1]

    def _product(self, layer: int, module: str, x: str) -> tuple[str, str]:
        """Product with a linear layer of a block, and its bias, still to be added."""
        rows, columns = self.spec.matrix_shapes()[module]
        tensor = self.spec.block(layer) + module
        matrix = self.weights.matrix(f"{tensor}.weight", rows, columns)
        product = linear(self.writer, f"layers.{layer}.{module}", x, matrix, self.accuracy_level)
        return product, self._vector(f"{tensor}.bias", rows)

    def _vector(self, tensor: str, size: int) -> str:
        name = tensor.removeprefix(self.spec.prefix)
        return self.writer.weight(name, self.weights.vector(tensor, size))
