"""The SigLIP tower with pixel shuffle and projection as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.families.base import TowerSpec
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

NAME = "vision_encoder"
# Both ops add a bias first: com.microsoft FastGelu is the tanh form, BiasGelu the erf form.
ACTIVATION_OPS = {"gelu_pytorch_tanh": "FastGelu", "gelu": "BiasGelu"}


def position_ids(patches: int) -> NDArray[np.int64]:
    """Rows of the position table for a full tile of ``patches x patches``, as Idefics3 computes them.

    Idefics3VisionEmbeddings sorts the patches' fractional coordinates among boundaries, both in
    float32. For some grids (19, 25, 29, 31 of the first 36) rounding puts a patch into its
    neighbour's bucket, and a model of that grid was trained so.
    """
    places = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    places = np.minimum(places, np.float32(1.0 - 1e-6))
    buckets = np.searchsorted(_boundaries(patches), places, side="right").astype(np.int64)
    rows: NDArray[np.int64] = buckets[:, None] * patches + buckets[None, :]
    return rows.reshape(-1)


def _boundaries(patches: int) -> NDArray[np.float32]:
    # torch.arange(1/n, 1, 1/n) in float32 on a CPU with 8 lanes: two vectors at a time, whose first
    # value is rounded before the multiples are added; the rest one by one. (With 16 lanes torch
    # itself gives other buckets for the grids 19, 25, 29 and some above 37; not for 27 or 32.)
    lanes, step = 8, 1 / patches
    index = np.arange(math.ceil((1.0 - step) / step))
    exact = step + step * index
    lane = index % lanes
    first = (step + step * (index - lane)).astype(np.float32).astype(np.float64)
    vectors = index < len(index) // (2 * lanes) * (2 * lanes)
    return np.where(vectors, first + lane * step, exact).astype(np.float32)


def write_tower(
    folder: Path, spec: TowerSpec, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] -> image_features float32
    [batch * tiles, tokens, output_size]. Raises `InputRefused` when tensors are missing or of
    other shapes.
    """
    with GraphWriter(folder, NAME) as writer:
        _Tower(writer, spec, weights, accuracy_level).build()
        return writer.finish()


class _Tower:
    def __init__(
        self, writer: GraphWriter, spec: TowerSpec, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.accuracy_level = accuracy_level

    def build(self) -> None:
        writer, spec = self.writer, self.spec
        side = spec.image_size
        pixels = writer.input(
            "pixel_values", TensorProto.FLOAT, ["batch_size", "tiles", 3, side, side]
        )
        features = writer.output(
            "image_features", TensorProto.FLOAT, ["features", spec.tokens, spec.output_size]
        )
        # A sum waits to be added until the next norm, which adds it in the same pass.
        residual, addition, bias = self._embed(pixels), "", ""
        for layer in range(spec.layers):
            at = f"{spec.prefix}encoder.layers.{layer}."
            name = f"layers.{layer}"
            normed, residual = self._add_norm(f"{at}layer_norm1", residual, addition, bias)
            attended = self._attention(name, f"{at}self_attn.", normed)
            addition, bias = self._linear(f"{name}.out_proj", f"{at}self_attn.out_proj", attended)
            normed, residual = self._add_norm(f"{at}layer_norm2", residual, addition, bias)
            addition, bias = self._mlp(name, f"{at}mlp.", normed)
        last, _ = self._add_norm(f"{spec.prefix}post_layernorm", residual, addition, bias)
        shuffled = self._shuffle(last)
        matrix = self.weights.matrix(
            spec.projection, spec.output_size, spec.hidden_size * spec.shuffle**2
        )
        linear(writer, "projection", shuffled, matrix, self.accuracy_level, output=features)

    def _embed(self, pixels: str) -> str:
        writer, spec = self.writer, self.spec
        at = f"{spec.prefix}embeddings."
        flat = self._reshape("tiles", pixels, [-1, 3, spec.image_size, spec.image_size])
        shape = (spec.hidden_size, 3, spec.patch_size, spec.patch_size)
        kernel = float_weight(
            writer, "patch.weight", self.weights.array(f"{at}patch_embedding.weight", shape)
        )
        bias = self._vector(f"{at}patch_embedding.bias", spec.hidden_size)
        attributes = {
            "kernel_shape": [spec.patch_size] * 2,
            "strides": [spec.patch_size] * 2,
        }
        patches = writer.node("Conv", "patch", [flat, kernel, bias], attributes=attributes)
        rows = self._reshape("patch_rows", patches, [0, spec.hidden_size, spec.patches**2])
        rows = writer.node("Transpose", "patch_turn", [rows], attributes={"perm": [0, 2, 1]})
        table = self.weights.array(
            f"{at}position_embedding.weight", (spec.patches**2, spec.hidden_size)
        )
        placed = float_weight(writer, "positions", table[position_ids(spec.patches)])
        return writer.node("Add", "embedded", [rows, placed])

    def _add_norm(self, tensor: str, residual: str, addition: str, bias: str) -> tuple[str, str]:
        """Layer norm of residual + addition + bias, and that sum."""
        name = tensor.removeprefix(self.spec.prefix).removeprefix("encoder.")
        size = self.spec.hidden_size
        scale = self._vector(f"{tensor}.weight", size)
        shift = self._vector(f"{tensor}.bias", size)
        epsilon = {"epsilon": self.spec.norm_eps}
        if not addition:
            normed = self.writer.node(
                "LayerNormalization",
                name,
                [residual, scale, shift],
                attributes={**epsilon, "axis": -1},
            )
            return normed, residual
        outputs = [f"{name}:0", "", "", f"{name}:sum"]
        if name == "post_layernorm":
            outputs = outputs[:1]
        self.writer.node(
            "SkipLayerNormalization",
            name,
            [residual, addition, scale, shift, bias],
            domain=MICROSOFT,
            outputs=outputs,
            attributes=epsilon,
        )
        return outputs[0], outputs[-1]

    def _attention(self, name: str, at: str, x: str) -> str:
        size = self.spec.hidden_size
        values, biases = [], []
        for part in "qkv":
            tensor = f"{at}{part}_proj"
            matrix = self.weights.matrix(f"{tensor}.weight", size, size)
            values.append(
                linear(self.writer, f"{name}.{part}_proj", x, matrix, self.accuracy_level)
            )
            biases.append(self.weights.vector(f"{tensor}.bias", size))
        bias = self.writer.weight(f"{name}.qkv_proj.bias", np.concatenate(biases))
        # Without a mask onnxruntime's CPU kernel works in blocks: no patches x patches matrix.
        return self.writer.node(
            "MultiHeadAttention",
            f"{name}.attention",
            [*values, bias],
            domain=MICROSOFT,
            attributes={
                "num_heads": self.spec.heads,
                "scale": float(np.float32((size // self.spec.heads) ** -0.5)),
            },
        )

    def _mlp(self, name: str, at: str, x: str) -> tuple[str, str]:
        spec = self.spec
        matrix = self.weights.matrix(f"{at}fc1.weight", spec.intermediate_size, spec.hidden_size)
        wide = linear(self.writer, f"{name}.fc1", x, matrix, self.accuracy_level)
        bias = self._vector(f"{at}fc1.bias", spec.intermediate_size)
        op = ACTIVATION_OPS[spec.activation]
        active = self.writer.node(op, f"{name}.gelu", [wide, bias], domain=MICROSOFT)
        return self._linear(f"{name}.fc2", f"{at}fc2", active, columns=spec.intermediate_size)

    def _linear(
        self, name: str, tensor: str, x: str, *, columns: int | None = None
    ) -> tuple[str, str]:
        """Product with a matrix of `hidden_size` rows, and its bias, still to be added."""
        size = self.spec.hidden_size
        matrix = self.weights.matrix(f"{tensor}.weight", size, columns or size)
        product = linear(self.writer, name, x, matrix, self.accuracy_level)
        return product, self._vector(f"{tensor}.bias", size)

    def _shuffle(self, x: str) -> str:
        """Each square of ``shuffle x shuffle`` patches becomes one row, row by row within it."""
        spec = self.spec
        s, side = spec.shuffle, spec.patches // spec.shuffle
        split = self._reshape("shuffle_split", x, [-1, side, s, side, s * spec.hidden_size])
        turned = self.writer.node(
            "Transpose", "shuffle_turn", [split], attributes={"perm": [0, 1, 3, 2, 4]}
        )
        return self._reshape("shuffled", turned, [-1, spec.tokens, s * s * spec.hidden_size])

    def _vector(self, tensor: str, size: int) -> str:
        name = tensor.removeprefix(self.spec.prefix).removeprefix("encoder.")
        return self.writer.weight(name, self.weights.vector(tensor, size))

    def _reshape(self, name: str, x: str, shape: list[int]) -> str:
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])
