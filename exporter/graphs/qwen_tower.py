"""The vision part of Qwen2-VL and Qwen2.5-VL as an ONNX graph of onnxruntime's fused ops.

One image per run: attention over all its patches needs no mask, so onnxruntime's kernel works in
blocks and no patches x patches matrix exists. Layers with windows gather the patches of each window
into a batch row, attend there (short windows know their length), and gather the rows back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.qwen_vision import NORM_EPS, QwenVisionSpec
from exporter.graphs.attention import attention
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import QUICK_GELU_ALPHA, Layers, Stream
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.matrices import stack_rows
from exporter.graphs.rotary import AxisRotary, frequencies
from exporter.graphs.tower import NAME
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def write_qwen_vision(
    folder: Path,
    spec: QwenVisionSpec,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [patches, patch_values], patch_positions int64 [patches, 2]; with windows
    also window_patches int64 [windows, longest], window_lengths int32 [windows] and patch_places int64
    [patches] (`families.specs.qwen_vision.windows`) -> image_features float32 [rows, output_size]. Raises
    `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        _Tower(writer, spec, weights, accuracy_level).build()
        return writer.finish()


class _Tower:
    """Values are float32 ``[1, patches, hidden]``."""

    def __init__(
        self, writer: GraphWriter, spec: QwenVisionSpec, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.accuracy_level = accuracy_level
        self.layers = Layers(writer, weights, accuracy_level, NORM_EPS, (spec.prefix,))

    def build(self) -> None:
        writer, spec = self.writer, self.spec
        pixels = writer.input("pixel_values", FLOAT, ["patches", spec.patch_values])
        places = writer.input("patch_positions", INT64, ["patches", 2])
        if spec.window:
            writer.input("window_patches", INT64, ["windows", "longest"])
            writer.input("window_lengths", INT32, ["windows"])
            writer.input("patch_places", INT64, ["patches"])
        features = writer.output("image_features", FLOAT, ["rows", spec.output_size])
        # Half of a head's angles follow the row, half the column, both by the same frequencies.
        half = frequencies(spec.head_dim // 2, spec.rope_theta)
        table = np.kron(np.eye(2, dtype=np.float32), half)
        self.rotary = AxisRotary(writer, places, table)
        self.first = ""
        if writer.dialect is None:
            self.first = writer.constant("rotary.first", np.zeros(1, np.int64))
        stream = Stream(self._embed(pixels))
        for layer in range(spec.layers):
            stream = self._block(layer, stream)
        normed, _ = self._norm("merger.ln_q", stream, last=True)
        self._merge(normed, features)

    def _embed(self, pixels: str) -> str:
        # The convolution's stride is its kernel: each patch meets it once, as a matrix product.
        spec = self.spec
        side = spec.patch_size
        shape = (spec.hidden_size, 3, spec.patch_values // (3 * side**2), side, side)
        kernel = self.weights.array(f"{spec.prefix}patch_embed.proj.weight", shape)
        turned = np.ascontiguousarray(kernel.reshape(spec.hidden_size, -1).T)
        rows = self._reshape("patches", pixels, [1, -1, spec.patch_values])
        weight = float_weight(self.writer, "patch_embed.weight", turned)
        return self.writer.node("MatMul", "patch_embed", [rows, weight])

    def _block(self, layer: int, x: Stream) -> Stream:
        name = f"blocks.{layer}"
        normed, residual = self._norm(f"{name}.norm1", x)
        attended = self._attention(name, normed, windowed=self.spec.windowed(layer))
        size = self.spec.hidden_size
        product = self._product(f"{name}.attn.proj", attended, size, size)
        normed, residual = self._norm(f"{name}.norm2", Stream(residual, *product))
        return Stream(residual, *self._mlp(f"{name}.mlp", normed))

    def _norm(self, name: str, x: Stream, *, last: bool = False) -> tuple[str, str]:
        """Norm of the stream's sum, and that sum (which the `last` norm does not give)."""
        size, gated = self.spec.hidden_size, self.spec.gated
        return self.layers.norm(self._full(name), x, size, last=last, rms=gated)

    def _attention(self, name: str, x: str, *, windowed: bool) -> str:
        writer, size = self.writer, self.spec.hidden_size
        packed = self._biased(*self._product(f"{name}.attn.qkv", x, 3 * size, size))
        q, k, v = self._split(f"{name}.attn.parts", packed, 3)
        q = self.rotary.turn(f"{name}.q_rotary", q, self.first, self.spec.heads)
        k = self.rotary.turn(f"{name}.k_rotary", k, self.first, self.spec.heads)
        inputs = [q, k, v]
        if windowed:
            inputs = [
                self._windows(f"{name}.{p}_windows", t) for p, t in zip("qkv", inputs, strict=True)
            ]
            inputs += ["", "window_lengths"]
        spec = self.spec
        attended = attention(writer, f"{name}.attention", inputs, spec.heads, spec.head_dim)
        if not windowed:
            return attended
        flat = self._reshape(f"{name}.slots", attended, [1, -1, size])
        places = [flat, "patch_places"]
        return writer.node("Gather", f"{name}.patches", places, attributes={"axis": 1})

    def _windows(self, name: str, x: str) -> str:
        """The patches of each window as one row of a batch: ``[windows, longest, hidden]``."""
        rows = self._reshape(f"{name}.rows", x, [-1, self.spec.hidden_size])
        return self.writer.node("Gather", name, [rows, "window_patches"], attributes={"axis": 0})

    def _mlp(self, name: str, x: str) -> tuple[str, str]:
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        if not self.spec.gated:
            wide = self._biased(*self._product(f"{name}.fc1", x, inner, hidden))
            active = self._quick_gelu(f"{name}.gelu", wide, QUICK_GELU_ALPHA)
            return self._product(f"{name}.fc2", active, hidden, inner)
        parts = [f"{name}.{p}_proj" for p in ("gate", "up")]
        biases = [self.weights.vector(self._full(f"{p}.bias"), inner) for p in parts]
        both = stack_rows(
            [self.weights.matrix(self._full(f"{p}.weight"), inner, hidden) for p in parts]
        )
        product = linear(self.writer, f"{name}.gate_up", x, both, self.accuracy_level)
        bias = self.writer.weight(f"{name}.gate_up.bias", np.concatenate(biases))
        gate, up = self._split(f"{name}.parts", self._biased(product, bias), 2)
        # Quick GELU with alpha 1 is x * sigmoid(x), in one pass.
        silu = self._quick_gelu(f"{name}.silu", gate, 1.0)
        gated = self.writer.node("Mul", f"{name}.gated", [silu, up])
        return self._product(f"{name}.down_proj", gated, hidden, inner)

    def _merge(self, x: str, features: str) -> None:
        """The patches of a feature row side by side, then a two-layer MLP."""
        writer, size = self.writer, self.spec.hidden_size * self.spec.merge**2
        rows = self._reshape("merger.rows", x, [-1, size])
        product, bias = self._product("merger.mlp.0", rows, size, size)
        active = writer.node("BiasGelu", "merger.gelu", [product, bias], domain=MICROSOFT)
        last = self._product("merger.mlp.2", active, self.spec.output_size, size)
        writer.node("Add", "merger.mlp.2/bias", list(last), outputs=[features])

    def _product(self, name: str, x: str, rows: int, columns: int) -> tuple[str, str]:
        """Product with the matrix `name`, and its bias, still to be added."""
        return self.layers.product(self._full(name), x, (rows, columns))

    def _biased(self, product: str, bias: str) -> str:
        return self.writer.node("Add", f"{bias}/add", [product, bias])

    def _quick_gelu(self, name: str, x: str, alpha: float) -> str:
        attributes = {"alpha": alpha}
        return self.writer.node("QuickGelu", name, [x], domain=MICROSOFT, attributes=attributes)

    def _split(self, name: str, x: str, count: int) -> list[str]:
        outputs = [f"{name}:{i}" for i in range(count)]
        attributes = {"axis": -1, "num_outputs": count}
        self.writer.node("Split", name, [x], outputs=outputs, attributes=attributes)
        return outputs

    def _full(self, name: str) -> str:
        return self.spec.prefix + name

    def _reshape(self, name: str, x: str, shape: list[int]) -> str:
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])
