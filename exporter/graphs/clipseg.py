"""CLIPSeg's image tower and mask decoder as ONNX graphs of onnxruntime's fused ops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.families.specs.clipseg import ClipStates, MaskDecoder
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT = TensorProto.FLOAT
LAST = np.iinfo(np.int64).max
# torch's bicubic interpolation (and ONNX's default): the kernel of Keys with this slope.
CUBIC = -0.75


def write_clip_states(
    folder: Path, name: str, spec: ClipStates, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, height, width] in whole patches -> activations.{i} float32
    [images, 1 + patches, hidden] for each block whose states are read. Raises `InputRefused` when
    tensors are missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, spec.tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", FLOAT, ["images", 3, "height", "width"])
        normed, _ = vit.norm(
            f"{spec.tower.prefix}pre_layrnorm", Stream(_embedded(vit, spec, pixels))
        )
        outputs = dict(zip(spec.extract, spec.outputs(), strict=True))
        give_states(vit, normed, spec.tower.used_layers, outputs)
        return writer.finish()


def write_mask_decoder(
    folder: Path, name: str, spec: MaskDecoder, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    activations.{i} float32 [1, 1 + patches, hidden] of one image and text_embeds float32
    [texts, text_size] -> logits float32 [texts, height, width]. Raises `InputRefused` when tensors
    are missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        _Decoder(Vit(writer, spec.blocks, weights, accuracy_level), spec).build()
        return writer.finish()


def give_states(vit: Vit, x: str, layers: int, outputs: Mapping[int, str]) -> None:
    """The first `layers` blocks over `x`, with outputs ``[images, rows, hidden]`` behind some of them:
    block to name.
    """
    writer = vit.writer
    shape: list[int | str] = ["images", "rows", vit.spec.hidden_size]
    for output in outputs.values():
        writer.output(output, FLOAT, shape)
    stream = Stream(x)
    for layer in range(layers):
        stream = vit.block(layer, stream)
        if layer in outputs:
            biased = writer.node("Add", f"read.{layer}/bias", [stream.addition, stream.bias])
            writer.node("Add", f"read.{layer}", [stream.residual, biased], outputs=[outputs[layer]])


def _embedded(vit: Vit, spec: ClipStates, pixels: str) -> str:
    """Patches and, before them, the class token, each with its position at the image's own size."""
    writer, tower = vit.writer, spec.tower
    size, at, side = tower.hidden_size, f"{tower.prefix}embeddings.", tower.patch_size
    stored = vit.weights.array(f"{at}patch_embedding.weight", (size, 3, side, side))
    attributes = {"kernel_shape": [side, side], "strides": [side, side]}
    kernel = float_weight(writer, "patch.weight", stored)
    grid = writer.node("Conv", "patch", [pixels, kernel], attributes=attributes)
    table = vit.weights.array(f"{at}position_embedding.weight", (tower.rows, size))
    rows = _interpolated(vit, spec, grid, table[1:].astype(np.float32))
    first = vit.weights.vector(f"{at}class_embedding", size) + table[0].astype(np.float32)
    token = writer.weight("class_token", first.reshape(1, 1, size))
    return vit.behind_token(_as_rows(vit, "patch_rows", grid, size), rows, token)


def _interpolated(vit: Vit, spec: ClipStates, grid: str, table: NDArray[np.float32]) -> str:
    """Positions ``[1, patches, hidden]`` for the patches of `grid`: bicubic between the tower's own."""
    writer, patches, size = vit.writer, spec.tower.patches, spec.tower.hidden_size
    square = np.ascontiguousarray(table.reshape(1, patches, patches, size).transpose(0, 3, 1, 2))
    own = writer.weight("positions", square)
    leading = writer.constant("positions.leading", np.array([1, size], np.int64))
    sides = writer.node("Shape", "grid_sides", [grid], attributes={"start": 2, "end": 4})
    sizes = writer.node("Concat", "positions.sizes", [leading, sides], attributes={"axis": 0})
    resized = writer.node(
        "Resize",
        "positions.resized",
        [own, "", "", sizes],
        attributes={
            "mode": "cubic",
            "cubic_coeff_a": CUBIC,
            "coordinate_transformation_mode": "half_pixel",
        },
    )
    return _as_rows(vit, "position_rows", resized, size)


def _as_rows(vit: Vit, name: str, grid: str, size: int) -> str:
    """A grid ``[images, size, height, width]`` as rows ``[images, height * width, size]``."""
    flat = vit.reshape(f"{name}.flat", grid, [0, size, -1])
    return vit.writer.node("Transpose", name, [flat], attributes={"perm": [0, 2, 1]})


class _Decoder:
    """Values are float32 ``[images or texts, rows, reduced]`` until the convolutions."""

    def __init__(self, vit: Vit, spec: MaskDecoder) -> None:
        self.vit, self.spec, self.writer = vit, spec, vit.writer

    def build(self) -> None:
        spec, writer = self.spec, self.writer
        width = spec.state_size
        texts = writer.input("text_embeds", FLOAT, ["texts", spec.text_size])
        names = spec.inputs()
        for name in names:
            writer.input(name, FLOAT, [1, "rows", width])
        x = ""
        # The deepest states first.
        for layer, name in enumerate(reversed(names)):
            reduced = self._layer(f"reduce.{layer}", f"{spec.reduce}{layer}", name, width)
            x = writer.node("Add", f"joined.{layer}", [reduced, x]) if x else reduced
            if layer == spec.conditional:
                x = self._modulated(x, texts)
            x = self._block(layer, x)
        ends = {"grid.start": 1, "grid.end": LAST, "grid.axis": 1}
        bounds = [writer.constant(k, np.array([v], np.int64)) for k, v in ends.items()]
        rows = writer.node("Slice", "grid_rows", [x, *bounds])
        turned = writer.node("Transpose", "grid_turned", [rows], attributes={"perm": [0, 2, 1]})
        grid = self._square(turned)
        mask = self._convolved(grid)
        axis = writer.constant("channel_axis", np.array([1], np.int64))
        logits = writer.output("logits", FLOAT, ["texts", "height", "width"])
        writer.node("Squeeze", "mask", [mask, axis], outputs=[logits])

    def _layer(self, name: str, tensor: str, x: str, inputs: int) -> str:
        """A linear layer that every scheme keeps in float."""
        product, bias = self.vit.product(name, tensor, x, (self.vit.spec.hidden_size, inputs))
        return self.writer.node("Add", f"{name}/bias", [product, bias])

    def _modulated(self, x: str, texts: str) -> str:
        """``x`` times a factor of the text, plus a term of it, in every row: one image becomes one for
        each text.
        """
        at, axis = self.vit.spec.prefix, self.writer.constant("row_axis", np.array([1], np.int64))
        parts = []
        for part in ("mul", "add"):
            name, size = f"film_{part}", self.spec.text_size
            value = self._layer(name, f"{at}{name}", texts, size)
            parts.append(self.writer.node("Unsqueeze", f"{name}.rows", [value, axis]))
        scaled = self.writer.node("Mul", "film_scaled", [parts[0], x])
        return self.writer.node("Add", "film", [scaled, parts[1]])

    def _block(self, layer: int, x: str) -> str:
        """Attention of all rows to all, then the MLP, each added to its input and normed."""
        vit, spec = self.vit, self.vit.spec
        at, name = f"{spec.prefix}{spec.names.blocks}{layer}.", f"layers.{layer}"
        attended = vit.attention(name, f"{at}{spec.names.attention}", x)
        out = f"{at}{spec.names.attention}{spec.names.out}"
        stream = Stream(x, *vit.product(f"{name}.out_proj", out, attended))
        x, _ = vit.norm(f"{at}{spec.names.first_norm}", stream, last=True)
        stream = Stream(x, *self._mlp(name, f"{at}mlp.", x))
        normed, _ = vit.norm(f"{at}{spec.names.second_norm}", stream, last=True)
        return normed

    def _mlp(self, name: str, at: str, x: str) -> tuple[str, str]:
        hidden, inner = self.vit.spec.hidden_size, self.vit.spec.intermediate_size
        wide = list(self.vit.product(f"{name}.fc1", f"{at}fc1", x, (inner, hidden)))
        biased = self.writer.node("Add", f"{name}.fc1/bias", wide)
        active = self.writer.node("Relu", f"{name}.relu", [biased])
        return self.vit.product(f"{name}.fc2", f"{at}fc2", active, (hidden, inner))

    def _square(self, x: str) -> str:
        """Columns ``[texts, reduced, patches]`` as a square grid."""
        writer = self.writer
        count = writer.node("Shape", "patch_count", [x], attributes={"start": 2, "end": 3})
        number = writer.node("Cast", "patch_number", [count], attributes={"to": FLOAT})
        root = writer.node("Sqrt", "grid_root", [number])
        side = writer.node("Cast", "grid_side", [root], attributes={"to": TensorProto.INT64})
        shape = np.array([0, self.vit.spec.hidden_size], np.int64)
        leading = writer.constant("grid.leading", shape)
        whole = writer.node("Concat", "grid.shape", [leading, side, side], attributes={"axis": 0})
        return writer.node("Reshape", "grid", [x, whole])

    def _convolved(self, x: str) -> str:
        """The mask ``[texts, 1, height, width]``."""
        for number, (name, shape, turned) in enumerate(self.spec.convolutions()):
            if number:
                x = self.writer.node("Relu", f"mask.{number}.relu", [x])
            weights, side = self.vit.weights, shape[-1]
            kernel = float_weight(
                self.writer, f"mask.{number}", weights.array(f"{name}.weight", shape)
            )
            outputs = shape[1 if turned else 0]
            bias = self.writer.weight(
                f"mask.{number}.bias", weights.vector(f"{name}.bias", outputs)
            )
            strides = side if turned else 1
            attributes = {"kernel_shape": [side] * 2, "strides": [strides] * 2}
            if not turned:
                attributes["pads"] = [side // 2] * 4
            op = "ConvTranspose" if turned else "Conv"
            x = self.writer.node(
                op, f"mask.{number}.product", [x, kernel, bias], attributes=attributes
            )
        return x
