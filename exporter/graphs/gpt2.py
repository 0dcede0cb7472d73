"""GPT-2 with cross-attention as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

from exporter.families.specs.gpt2 import Gpt2Spec
from exporter.graphs.attention import attention
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import linear
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.vit import ACTIVATION_OPS, Stream
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph


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
        self.accuracy_level = options.accuracy_level
        self.text = TextGraph(writer, spec)

    def build(self) -> None:
        spec, logits = self.spec, self.text.logits
        stream = Stream(self._placed())
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        normed, _ = self._norm(f"{spec.prefix}ln_f", stream, last=True)
        name, again = (spec.embedding, True) if self._shared_head() else (spec.head, False)
        head = self.weights.matrix(name, spec.vocab_size, spec.hidden_size, again=again)
        linear(self.writer, "head", normed, head, self.accuracy_level, output=logits)

    def _shared_head(self) -> bool:
        return self.spec.tied and not self.weights.has(self.spec.head)

    def _placed(self) -> str:
        """Embeddings with the learned positions of their places."""
        shape = (self.spec.max_positions, self.spec.hidden_size)
        return self.text.placed(self.weights.array(self.spec.positions, shape))

    def _block(self, layer: int, x: Stream) -> Stream:
        at, name = self.spec.block(layer), f"h.{layer}"
        normed, residual = self._norm(f"{at}ln_1", x)
        attended = self._attention(layer, normed)
        if layer == self.spec.layers - 1:
            # Behind the last attention no position needs another: drop those nobody asked for.
            attended = self.text.keep("keep_attended", attended)
            residual = self.text.keep("keep_residual", residual)
        x = Stream(residual, *self._product(layer, "attn.c_proj", attended))
        normed, residual = self._norm(f"{at}ln_cross_attn", x)
        seen = self._cross_attention(layer, normed)
        x = Stream(residual, *self._product(layer, "crossattention.c_proj", seen))
        normed, residual = self._norm(f"{at}ln_2", x)
        wide = self._product(layer, "mlp.c_fc", normed)
        op = ACTIVATION_OPS[self.spec.activation]
        active = self.writer.node(op, f"{name}.gelu", list(wide), domain=MICROSOFT)
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

    def _norm(self, tensor: str, x: Stream, *, last: bool = False) -> tuple[str, str]:
        """Layer norm of the stream's sum, and that sum (which the `last` norm does not give)."""
        name, size = tensor.removeprefix(self.spec.prefix), self.spec.hidden_size
        vectors = [self._vector(f"{tensor}.{part}", size) for part in ("weight", "bias")]
        epsilon = {"epsilon": self.spec.norm_eps}
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
        outputs, inputs = self.spec.layer_shapes()[module]
        tensor = self.spec.block(layer) + module
        matrix = self.weights.matrix(f"{tensor}.weight", outputs, inputs, turned=True)
        product = linear(self.writer, f"h.{layer}.{module}", x, matrix, self.accuracy_level)
        return product, self._vector(f"{tensor}.bias", outputs)

    def _vector(self, tensor: str, size: int) -> str:
        name = tensor.removeprefix(self.spec.prefix)
        return self.writer.weight(name, self.weights.vector(tensor, size))
