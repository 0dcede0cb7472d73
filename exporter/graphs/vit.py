"""The parts that vision transformers share, in onnxruntime's fused ops: patches and pre-norm blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.families.base import VitSpec
from exporter.graphs.attention import attention
from exporter.graphs.layers import Layers, Projection, Stream, activate
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.matrices import Matrix
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter


class Vit:
    """Writes pieces of one tower into a graph; values are float32 ``[tiles, rows, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: VitSpec, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.accuracy_level = accuracy_level
        prefixes = (spec.prefix, "encoder.")
        self.layers = Layers(writer, weights, accuracy_level, spec.norm_eps, prefixes)

    def patches(self, pixels: str, *, bias: bool) -> str:
        """Rows of the patch convolution of pixels ``[batch, tiles, 3, side, side]``."""
        writer, spec = self.writer, self.spec
        flat = self.reshape("tiles", pixels, [-1, 3, spec.image_size, spec.image_size])
        shape = (spec.hidden_size, 3, spec.patch_size, spec.patch_size)
        name = spec.prefix + spec.names.patch
        stored = (shape[0], 3 * spec.patch_size**2) if spec.names.flat else shape
        kernel = self.weights.array(f"{name}.weight", stored).reshape(shape)
        inputs = [flat, float_weight(writer, "patch.weight", kernel)]
        if bias:
            inputs.append(self.vector(f"{name}.bias", spec.hidden_size))
        attributes = {"kernel_shape": [spec.patch_size] * 2, "strides": [spec.patch_size] * 2}
        patches = writer.node("Conv", "patch", inputs, attributes=attributes)
        rows = self.reshape("patch_rows", patches, [0, spec.hidden_size, spec.patches**2])
        return writer.node("Transpose", "patch_turn", [rows], attributes={"perm": [0, 2, 1]})

    def class_token_and_patches(self, token: str, table: str, pixels: str) -> str:
        """Patches of `pixels` behind the class token, each with its position: the tensors `token`
        ``[1, 1, hidden]`` and `table` ``[1, 1 + patches, hidden]``.
        """
        size = self.spec.hidden_size
        stored = self.weights.array(table, (1, self.spec.patches**2 + 1, size))
        class_token = self.weights.array(token, (1, 1, size)).astype(np.float32)
        first = self.writer.weight("class_token", class_token + stored[:, :1].astype(np.float32))
        rows = self.patches(pixels, bias=True)
        return self.behind_token(rows, float_weight(self.writer, "positions", stored[:, 1:]), first)

    def behind_token(self, rows: str, positions: str, first: str) -> str:
        """Rows with `positions` added, and before them the token `first` ``[1, 1, hidden]`` of every tile."""
        writer = self.writer
        placed = writer.node("Add", "placed", [rows, positions])
        count = writer.node("Shape", "tile_count", [rows], attributes={"start": 0, "end": 1})
        ones = writer.constant("class_token.shape", np.array([1, 1], np.int64))
        shape = writer.node("Concat", "class_tokens.shape", [count, ones], attributes={"axis": 0})
        tokens = writer.node("Expand", "class_tokens", [first, shape])
        return writer.node("Concat", "embedded", [tokens, placed], attributes={"axis": 1})

    def block(self, layer: int, x: Stream) -> Stream:
        """Block `layer`: attention, then the MLP, each behind its norm and added to the residual."""
        names = self.spec.names
        at, name = f"{self.spec.prefix}{names.blocks}{layer}.", f"layers.{layer}"
        normed, residual = self.norm(f"{at}{names.first_norm}", x)
        attended = self.attention(name, f"{at}{names.attention}", normed)
        product = self.product(f"{name}.out_proj", f"{at}{names.attention}{names.out}", attended)
        normed, residual = self.norm(f"{at}{names.second_norm}", Stream(residual, *product))
        return Stream(residual, *self._mlp(name, f"{at}mlp.", normed))

    def norm(self, tensor: str, x: Stream, *, last: bool = False) -> tuple[str, str]:
        """Layer norm of the stream's sum, and that sum (which the `last` norm does not give)."""
        return self.layers.norm(tensor, x, self.spec.hidden_size, last=last)

    def total(self, name: str, x: Stream) -> str:
        """The stream's sum, where no norm follows."""
        if not x.addition:
            return x.residual
        product = self.writer.node("Add", f"{name}/bias", [x.addition, x.bias])
        return self.writer.node("Add", name, [x.residual, product])

    def activate(self, name: str, kind: str, x: str, bias: str) -> str:
        """The activation `kind` of x + bias."""
        return activate(self.writer, name, kind, x, bias)

    def product(
        self, name: str, tensor: str, x: str, shape: tuple[int, int] | None = None
    ) -> tuple[str, str]:
        """Product with the matrix `tensor` (hidden x hidden unless `shape` says otherwise), and its
        bias, still to be added.
        """
        square = (self.spec.hidden_size, self.spec.hidden_size)
        return self.layers.product(tensor, x, shape or square, name=name)

    def multiply(self, name: str, x: str, matrix: Matrix, *, output: str | None = None) -> str:
        """``x @ matrix.T``; `output` names the result."""
        return linear(self.writer, name, x, matrix, self.accuracy_level, output=output)

    def vector(self, tensor: str, size: int) -> str:
        """A bias or norm weight as a float32 value."""
        return self.layers.vector(tensor, size)

    def reshape(self, name: str, x: str, shape: list[int]) -> str:
        """`x` in another shape; -1 and 0 as in ONNX."""
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])

    def attention(self, name: str, at: str, x: str) -> str:
        """Attention of all rows of a tile to one another; the tensors' names begin with `at`."""
        size, bias = self.spec.hidden_size, f"{name}.qkv_proj.bias"
        if not self.spec.names.fused:
            parts = [
                Projection(f"{at}{part}_proj", x, (size, size), f"{name}.{part}_proj")
                for part in "qkv"
            ]
            return self.attend(name, *self.layers.projected(bias, parts))
        tensor, split = f"{at}{self.spec.names.fused}", [f"{name}.{part}" for part in "qkv"]
        matrix = self.weights.matrix(f"{tensor}.weight", 3 * size, size)
        packed = self.multiply(f"{name}.qkv_proj", x, matrix)
        thirds = {"axis": -1, "num_outputs": 3}
        self.writer.node("Split", f"{name}.split", [packed], outputs=split, attributes=thirds)
        stored = self.writer.weight(bias, self.weights.vector(f"{tensor}.bias", 3 * size))
        return self.attend(name, split, stored)

    def attend(self, name: str, values: Sequence[str], bias: str) -> str:
        """Attention of queries, keys and values ``[tiles, rows, hidden]`` plus their parts of `bias`."""
        heads, width = self.spec.heads, self.spec.hidden_size // self.spec.heads
        return attention(self.writer, f"{name}.attention", [*values, bias], heads, width)

    def _mlp(self, name: str, at: str, x: str) -> tuple[str, str]:
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        wide, bias = self.product(f"{name}.fc1", f"{at}fc1", x, (inner, hidden))
        active = self.activate(f"{name}.gelu", self.spec.activation, wide, bias)
        return self.product(f"{name}.fc2", f"{at}fc2", active, (hidden, inner))
