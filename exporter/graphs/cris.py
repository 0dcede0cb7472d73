"""CRIS' image and text halves as ONNX graphs of onnxruntime's ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.cris import Bottleneck, Convolved, CrisImage, CrisText, level_shapes
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import QUICK_GELU_ALPHA, Layers, Projection
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.matrices import Matrix, take_rows
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
# Of torch's batch and layer norms.
NORM_EPS = 1e-5


def write_cris_image(
    folder: Path, name: str, spec: CrisImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, input_size, input_size] -> level_3, level_4, level_5 float32
    [images, channels, side, side]: what the pyramid makes of the ResNet's maps without a text.
    Raises `InputRefused` when tensors are missing or of other shapes.
    """
    side = spec.sizes.input_size
    with GraphWriter(folder, name) as writer:
        net = Net(writer, weights, accuracy_level)
        x = writer.input("pixel_values", FLOAT, ["images", 3, side, side])
        for output, (channels, edge) in level_shapes(spec.sizes).items():
            writer.output(output, FLOAT, ["images", channels, edge, edge])
        maps = _stages(net, spec, x)
        v5 = _pooled(net, spec, maps[4])
        fine, middle, deep = spec.levels()
        net.pool("level_3", net.convolved(fine, maps[2]), output="level_3")
        net.convolved(middle, maps[3], output="level_4")
        net.convolved(deep, v5, output="level_5")
        return writer.finish()


def write_cris_text(
    folder: Path, name: str, spec: CrisText, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids int64 [texts, length] -> text_embeds float32 [texts, embed_dim] of the first highest id,
    words float32 [texts, length, width], word_mask float32 [texts, length] (0 for id 0). Raises
    `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        _Text(Net(writer, weights, accuracy_level), spec).build()
        return writer.finish()


def named(output: str | None) -> list[str] | None:
    """The outputs of a node that gives `output`, or one that is named by its node."""
    return None if output is None else [output]


class Net:
    """Writes pieces of any of the three graphs."""

    def __init__(self, writer: GraphWriter, weights: WeightSource, accuracy_level: int) -> None:
        self.writer, self.weights, self.accuracy_level = writer, weights, accuracy_level
        self.layers = Layers(writer, weights, accuracy_level, NORM_EPS)

    def conv(self, name: str, x: str, shape: tuple[int, int, int], *, stride: int = 1) -> str:
        """The convolution `name` (outputs, inputs, side) without bias, padded to keep the size."""
        outputs, inputs, side = shape
        stored = self.weights.array(f"{name}.weight", (outputs, inputs, side, side))
        kernel = float_weight(self.writer, f"{name}.weight", stored)
        attributes = {
            "kernel_shape": [side, side],
            "strides": [stride, stride],
            "pads": [side // 2] * 4,
        }
        return self.writer.node("Conv", name, [x, kernel], attributes=attributes)

    def batch_norm(self, name: str, x: str, size: int) -> str:
        """The batch norm `name`; onnxruntime folds it into a convolution before it."""
        parts = ("weight", "bias", "running_mean", "running_var")
        vectors = [self.vector(f"{name}.{part}", size) for part in parts]
        epsilon = {"epsilon": NORM_EPS}
        return self.writer.node("BatchNormalization", name, [x, *vectors], attributes=epsilon)

    def relu(self, name: str, x: str, output: str | None = None) -> str:
        """The positive part."""
        return self.writer.node("Relu", f"{name}/relu", [x], outputs=named(output))

    def convolved(self, spec: Convolved, x: str, output: str | None = None) -> str:
        """Convolution, batch norm and ReLU."""
        found = self.conv(f"{spec.name}.0", x, (spec.outputs, spec.inputs, spec.side))
        return self.relu(spec.name, self.batch_norm(f"{spec.name}.1", found, spec.outputs), output)

    def pool(self, name: str, x: str, *, output: str | None = None) -> str:
        """Averages of 2 x 2 cells."""
        halved = {"kernel_shape": [2, 2], "strides": [2, 2]}
        outputs = named(output)
        return self.writer.node(
            "AveragePool", f"{name}/pool", [x], outputs=outputs, attributes=halved
        )

    def rows(self, name: str, grid: str, channels: int) -> str:
        """A grid ``[n, channels, height, width]`` as rows ``[n, height * width, channels]``."""
        flat = self.reshape(f"{name}/flat", grid, [0, channels, -1])
        return self.writer.node("Transpose", f"{name}/rows", [flat], attributes={"perm": [0, 2, 1]})

    def grid(self, name: str, rows: str, channels: int, side: int) -> str:
        """Rows as a square grid again."""
        turn = {"perm": [0, 2, 1]}
        turned = self.writer.node("Transpose", f"{name}/turned", [rows], attributes=turn)
        return self.reshape(f"{name}/grid", turned, [0, channels, side, side])

    def reshape(self, name: str, x: str, shape: list[int]) -> str:
        """`x` in another shape; -1 and 0 as in ONNX."""
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])

    def layer(self, name: str, x: str, outputs: int, inputs: int) -> str:
        """The linear layer `name` with its bias."""
        product = self.layers.product(name, x, (outputs, inputs))
        return self.writer.node("Add", f"{name}/bias", list(product))

    def layer_norm(self, name: str, x: str, size: int, output: str | None = None) -> str:
        """The layer norm `name`."""
        vectors = [self.vector(f"{name}.{part}", size) for part in ("weight", "bias")]
        attributes = {"epsilon": NORM_EPS, "axis": -1}
        outputs = named(output)
        return self.writer.node(
            "LayerNormalization", name, [x, *vectors], outputs=outputs, attributes=attributes
        )

    def projected(self, name: str, parts: tuple[str, str, str], size: int) -> tuple[list[str], str]:
        """Queries, keys and values of torch's MultiheadAttention `name`, each of its own input, and the
        bias of all three, still to be added.
        """
        whole: Matrix = self.weights.matrix(f"{name}.in_proj_weight", 3 * size, size)
        values = [
            linear(
                self.writer,
                f"{name}.{part}",
                x,
                take_rows(whole, slice(i * size, (i + 1) * size)),
                self.accuracy_level,
            )
            for i, (part, x) in enumerate(zip("qkv", parts, strict=True))
        ]
        return values, self.vector(f"{name}.in_proj_bias", 3 * size)

    def attend(
        self, name: str, inputs: list[str], heads: int, size: int, *, causal: bool = False
    ) -> str:
        """Attention; `inputs` as MultiHeadAttention's."""
        attributes: dict[str, int | float] = {
            "num_heads": heads,
            "scale": float(np.float32((size // heads) ** -0.5)),
        }
        if causal:
            attributes["unidirectional"] = 1
        return self.writer.node(
            "MultiHeadAttention",
            f"{name}/attention",
            inputs,
            domain=MICROSOFT,
            attributes=attributes,
        )

    def vector(self, tensor: str, size: int) -> str:
        """A bias, or a norm's weight."""
        return self.layers.vector(tensor, size)


def _stages(net: Net, spec: CrisImage, x: str) -> dict[int, str]:
    """The maps behind each stage of the ResNet, by its number."""
    at = spec.prefix
    for i, (outputs, inputs, stride) in enumerate(spec.stem(), 1):
        x = net.conv(f"{at}conv{i}", x, (outputs, inputs, 3), stride=stride)
        x = net.relu(f"{at}bn{i}", net.batch_norm(f"{at}bn{i}", x, outputs))
    x, maps = net.pool(f"{at}stem", x), {}
    for stage, block in spec.blocks():
        x = maps[stage] = _bottleneck(net, block, x)
    return maps


def _bottleneck(net: Net, block: Bottleneck, x: str) -> str:
    at, planes, outputs = block.name, block.planes, block.outputs
    found = net.conv(f"{at}conv1", x, (planes, block.inputs, 1))
    found = net.relu(f"{at}bn1", net.batch_norm(f"{at}bn1", found, planes))
    found = net.conv(f"{at}conv2", found, (planes, planes, 3))
    found = net.relu(f"{at}bn2", net.batch_norm(f"{at}bn2", found, planes))
    if block.stride > 1:
        found = net.pool(f"{at}conv2", found)
    found = net.conv(f"{at}conv3", found, (outputs, planes, 1))
    found = net.batch_norm(f"{at}bn3", found, outputs)
    if block.downsampled:
        x = net.pool(f"{at}shortcut", x) if block.stride > 1 else x
        x = net.conv(f"{at}downsample.0", x, (outputs, block.inputs, 1))
        x = net.batch_norm(f"{at}downsample.1", x, outputs)
    return net.relu(at, net.writer.node("Add", f"{at}sum", [found, x]))


def _pooled(net: Net, spec: CrisImage, x: str) -> str:
    """Attention of the last stage's cells to one another, beside a convolution."""
    writer, at = net.writer, f"{spec.prefix}attnpool."
    deep, size, cells = spec.sizes.deep, spec.sizes.embed_dim, spec.cells
    side = spec.sizes.grid // 2
    table = net.weights.array(f"{at}positional_embedding", (cells**2 + 1, deep)).astype(np.float32)
    square = table[1:].reshape(1, cells, cells, deep).transpose(0, 3, 1, 2)
    own = writer.weight("positions", np.ascontiguousarray(square))
    sizes = writer.constant("positions.sizes", np.array([1, deep, side, side], np.int64))
    attributes = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}
    places = writer.node("Resize", "places", [own, "", "", sizes], attributes=attributes)
    rows = net.rows("cells", writer.node("Add", "placed", [x, places]), deep)
    stems = [f"{at}{part}_proj" for part in "qkv"]
    parts = [Projection(stem, rows, (deep, deep), stem) for stem in stems]
    values, bias = net.layers.projected(f"{at}bias", parts)
    found = net.attend(at, [*values, bias], deep // 64, deep)
    grid = net.grid("pooled", net.layer(f"{at}c_proj", found, size, deep), size, side)
    beside = net.batch_norm(f"{at}connect.1", net.conv(f"{at}connect.0", x, (size, deep, 1)), size)
    return net.relu(at, writer.node("Add", f"{at}sum", [grid, beside]))


class _Text:
    """Values are float32 ``[texts, length, width]``."""

    def __init__(self, net: Net, spec: CrisText) -> None:
        self.net, self.writer, self.spec = net, net.writer, spec

    def build(self) -> None:
        writer, spec, sizes = self.writer, self.spec, self.spec.sizes
        width, at = sizes.text_width, self.spec.prefix
        ids = writer.input("input_ids", INT64, ["texts", "length"])
        embeds = writer.output("text_embeds", FLOAT, ["texts", sizes.embed_dim])
        words = writer.output("words", FLOAT, ["texts", "length", width])
        mask = writer.output("word_mask", FLOAT, ["texts", "length"])
        x = self._embedded(ids)
        for layer in range(sizes.text_layers):
            x = self._block(spec.block(layer), x)
        self.net.layer_norm(f"{at}ln_final", x, width, output=words)
        # The first of equal values, as in torch.
        marks = writer.node("Cast", "ids/int32", [ids], attributes={"to": INT32})
        place = writer.node("ArgMax", "end_place", [marks], attributes={"axis": 1, "keepdims": 1})
        ends = writer.node("GatherND", "ends", [words, place], attributes={"batch_dims": 1})
        name = f"{at}text_projection"
        matrix = self.net.weights.matrix(name, sizes.embed_dim, width, turned=True)
        linear(writer, name, ends, matrix, self.net.accuracy_level, output=embeds)
        seen = writer.node("Cast", "is_word", [ids], attributes={"to": TensorProto.BOOL})
        writer.node("Cast", "word_number", [seen], outputs=[mask], attributes={"to": FLOAT})

    def _embedded(self, ids: str) -> str:
        net, writer, at, sizes = self.net, self.writer, self.spec.prefix, self.spec.sizes
        name, width = f"{at}token_embedding.weight", sizes.text_width
        table = net.weights.matrix(name, sizes.vocab_size, width)
        tokens = table_rows(writer, name, table, ids, "tokens")
        stored = net.weights.array(f"{at}positional_embedding", (sizes.context_length, width))
        zero, one = (writer.constant(f"places.{n}", np.array([n], np.int64)) for n in (0, 1))
        length = writer.node("Shape", "length", [ids], attributes={"start": 1, "end": 2})
        positions = float_weight(writer, "positions", stored)
        rows = writer.node("Slice", "places", [positions, zero, length, zero, one])
        return writer.node("Add", "placed", [tokens, rows])

    def _block(self, at: str, x: str) -> str:
        net, writer, sizes = self.net, self.writer, self.spec.sizes
        width = sizes.text_width
        normed = net.layer_norm(f"{at}ln_1", x, width)
        parts, bias = net.projected(f"{at}attn", (normed,) * 3, width)
        found = net.attend(f"{at}attn", [*parts, bias], sizes.text_heads, width, causal=True)
        found = net.layer(f"{at}attn.out_proj", found, width, width)
        x = writer.node("Add", f"{at}attended", [x, found])
        wide = net.layer(f"{at}mlp.c_fc", net.layer_norm(f"{at}ln_2", x, width), 4 * width, width)
        alpha = {"alpha": QUICK_GELU_ALPHA}
        active = writer.node("QuickGelu", f"{at}gelu", [wide], domain=MICROSOFT, attributes=alpha)
        found = net.layer(f"{at}mlp.c_proj", active, width, 4 * width)
        return writer.node("Add", f"{at}sum", [x, found])
