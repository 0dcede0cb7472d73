"""``torch.nn``'s encoder and decoder layers as ONNX graphs of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

from exporter.families.specs.post_norm import NORM_EPS, PostNormDecoder, PostNormSizes
from exporter.graphs.attention import attention
from exporter.graphs.decoder import NAME, DecoderOptions
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Layers, Stream
from exporter.graphs.linear import linear
from exporter.graphs.matrices import take_rows
from exporter.graphs.texts import TextGraph, check_heads
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph


def write_post_norm(
    folder: Path,
    spec: PostNormDecoder,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.gpt2.write_gpt2`. Raises `InputRefused` when tensors are missing or of
    other shapes, or the attention op cannot do the head size.
    """
    check_heads(spec, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


class PostNorm:
    """Writes pieces of layers into a graph; values are float32 ``[batch, rows, hidden]``."""

    def __init__(
        self, writer: GraphWriter, sizes: PostNormSizes, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.sizes = sizes
        self.weights = weights
        self.accuracy_level = accuracy_level
        self.layers = Layers(writer, weights, accuracy_level, NORM_EPS)

    def encoder_layer(self, name: str, x: str) -> str:
        """Attention of all rows to all, then the MLP; `name` has its dot."""
        packed = self.projected(f"{name}self_attn.", x, 0, 3)
        parts = [f"{name}self_attn.{part}" for part in "qkv"]
        split = {"axis": -1, "num_outputs": 3}
        self.writer.node("Split", f"{name}split", [packed], outputs=parts, attributes=split)
        x = self.added(f"{name}norm1", x, *self.output(f"{name}self_attn.", self.seen(name, parts)))
        return self.added(f"{name}norm2", x, *self.mlp(name, x))

    def seen(self, name: str, queries_keys_values: list[str]) -> str:
        """Attention without a mask."""
        sizes, inputs = self.sizes, queries_keys_values
        return attention(self.writer, f"{name}attention", inputs, sizes.heads, sizes.head_dim)

    def projected(self, name: str, x: str, first: int, last: int, *, again: bool = False) -> str:
        """Parts `first` to `last` of queries, keys and values of the attention called `name`.

        `again`: another graph has the other parts.
        """
        hidden = self.sizes.hidden_size
        rows = slice(first * hidden, last * hidden)
        whole = self.weights.matrix(f"{name}in_proj_weight", 3 * hidden, hidden, again=again)
        matrix = take_rows(whole, rows)
        product = linear(self.writer, f"{name}in_proj", x, matrix, self.accuracy_level)
        vector = self.weights.vector(f"{name}in_proj_bias", 3 * hidden, again=again)[rows]
        bias = self.writer.weight(f"{name}in_proj.bias", vector)
        return self.writer.node("Add", f"{name}in_proj/bias", [product, bias])

    def output(self, name: str, x: str) -> tuple[str, str]:
        """The output projection of the attention called `name`, and its bias, still to be added."""
        return self.product(f"{name}out_proj", x, self.sizes.hidden_size, self.sizes.hidden_size)

    def mlp(self, name: str, x: str) -> tuple[str, str]:
        """The two linear layers, and the last one's bias, still to be added."""
        hidden, inner = self.sizes.hidden_size, self.sizes.intermediate_size
        wide, bias = self.product(f"{name}linear1", x, inner, hidden)
        if self.sizes.activation == "gelu":
            gelu = self.writer.node("BiasGelu", f"{name}gelu", [wide, bias], domain=MICROSOFT)
            return self.product(f"{name}linear2", gelu, hidden, inner)
        biased = self.writer.node("Add", f"{name}linear1/add", [wide, bias])
        active = self.writer.node("Relu", f"{name}relu", [biased])
        return self.product(f"{name}linear2", active, hidden, inner)

    def added(self, name: str, x: str, addition: str, bias: str) -> str:
        """Layer norm of x + addition + bias."""
        stream = Stream(x, addition, bias)
        return self.layers.norm(name, stream, self.sizes.hidden_size, last=True)[0]

    def product(self, name: str, x: str, outputs: int, inputs: int) -> tuple[str, str]:
        """Product with the linear layer `name`, and its bias, still to be added."""
        return self.layers.product(name, x, (outputs, inputs))


class _Decoder:
    def __init__(
        self,
        writer: GraphWriter,
        spec: PostNormDecoder,
        weights: WeightSource,
        options: DecoderOptions,
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.text = TextGraph(writer, spec)
        self.blocks = PostNorm(writer, spec.sizes, weights, options.accuracy_level)

    def build(self) -> None:
        spec = self.spec
        table = self.weights.array(spec.positions, (spec.max_positions, spec.hidden_size))
        x = self.text.placed(table)
        for layer in range(spec.layers):
            x = self._layer(layer, x)
        self.text.head(self.blocks.layers, x)

    def _layer(self, layer: int, x: str) -> str:
        at, blocks = self.spec.layer(layer), self.blocks
        packed = blocks.projected(f"{at}self_attn.", x, 0, 3)
        attended = self.text.attention(layer, [packed, "", ""])
        attended = self.text.wanted(layer, "keep_attended", attended)
        x = self.text.wanted(layer, "keep_residual", x)
        x = blocks.added(f"{at}norm1", x, *blocks.output(f"{at}self_attn.", attended))
        queries = blocks.projected(f"{at}multihead_attn.", x, 0, 1, again=True)
        seen = blocks.seen(f"{at}multihead_attn.", [queries, *self.text.image(layer)])
        x = blocks.added(f"{at}norm2", x, *blocks.output(f"{at}multihead_attn.", seen))
        return blocks.added(f"{at}norm3", x, *blocks.mlp(at, x))
