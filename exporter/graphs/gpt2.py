"""GPT-2 with cross-attention as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

from exporter.families.specs.gpt2 import Gpt2Spec
from exporter.graphs.attention import attention
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Layers, Stream, activate
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_gpt2(
    folder: Path,
    spec: Gpt2Spec,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.decoder.write_decoder`, and cross_key_values.{i}.key|value float32
    [batch, heads, rows, head_dim] as the vision graph gives them. Raises `InputRefused` when tensors
    are missing or of other shapes, or the attention op cannot do the head size.
    """
    check_heads(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


class _Decoder:
    """Values are float32 ``[batch, sequence, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: Gpt2Spec, weights: WeightSource, options: DecoderOptions
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.text = TextGraph(writer, spec)
        level = options.accuracy_level
        self.layers = Layers(writer, weights, level, spec.norm_eps, (spec.prefix,))

    def build(self) -> None:
        spec = self.spec
        table = self.weights.array(spec.positions, (spec.max_positions, spec.hidden_size))
        stream = Stream(self.text.placed(table))
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        normed, _ = self.layers.norm(f"{spec.prefix}ln_f", stream, spec.hidden_size, last=True)
        self.text.head(self.layers, normed)

    def _block(self, layer: int, x: Stream) -> Stream:
        at, layers, size = self.spec.block(layer), self.layers, self.spec.hidden_size
        normed, residual = layers.norm(f"{at}ln_1", x, size)
        attended = self._attention(layer, normed)
        attended = self.text.wanted(layer, "keep_attended", attended)
        residual = self.text.wanted(layer, "keep_residual", residual)
        x = Stream(residual, *self._product(layer, "attn.c_proj", attended))
        normed, residual = layers.norm(f"{at}ln_cross_attn", x, size)
        seen = self._cross_attention(layer, normed)
        x = Stream(residual, *self._product(layer, "crossattention.c_proj", seen))
        normed, residual = layers.norm(f"{at}ln_2", x, size)
        wide = self._product(layer, "mlp.c_fc", normed)
        active = activate(self.writer, f"h.{layer}.gelu", self.spec.activation, *wide)
        return Stream(residual, *self._product(layer, "mlp.c_proj", active))

    def _attention(self, layer: int, x: str) -> str:
        product, bias = self._product(layer, "attn.c_attn", x)
        packed = self.writer.node("Add", f"h.{layer}.attn.c_attn/bias", [product, bias])
        return self.text.attention(layer, [packed, "", ""])

    def _cross_attention(self, layer: int, x: str) -> str:
        """Attention of every position to all rows of its image."""
        spec, writer = self.spec, self.writer
        name = f"h.{layer}.crossattention"
        product, bias = self._product(layer, "crossattention.q_attn", x)
        queries = writer.node("Add", f"{name}.q_attn/bias", [product, bias])
        inputs = [queries, *self.text.image(layer)]
        return attention(writer, name, inputs, spec.heads, spec.head_dim)

    def _product(self, layer: int, module: str, x: str) -> tuple[str, str]:
        """Product with a linear layer of a block, and its bias, still to be added."""
        shape = self.spec.layer_shapes()[module]
        return self.layers.product(self.spec.block(layer) + module, x, shape, turned=True)
