"""CRIS' pyramid, decoder and text-made kernel as one ONNX graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.families.specs.cris import TAPS, CrisMask, level_shapes
from exporter.graphs.cris import INT32, Net
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT = TensorProto.FLOAT
# Base of the wavelengths of places (arXiv 1706.03762, section 3.5).
BASE = 10000.0


def write_cris_mask(
    folder: Path, name: str, spec: CrisMask, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    level_3, level_4, level_5 float32 [1, channels, side, side] of one image, and text_embeds, words,
    word_mask as `graphs.cris.write_cris_text` gives them -> logits float32 [texts, height, width] at a
    quarter of the image's resolution. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    with GraphWriter(folder, name) as writer:
        _Mask(Net(writer, weights, accuracy_level), spec).build()
        return writer.finish()


class _Mask:
    def __init__(self, net: Net, spec: CrisMask) -> None:
        self.net, self.writer, self.spec, self.sizes = net, net.writer, spec, spec.sizes
        writer, sizes = net.writer, spec.sizes
        self.levels = {
            name: writer.input(name, FLOAT, [1, channels, side, side])
            for name, (channels, side) in level_shapes(sizes).items()
        }
        self.text = writer.input("text_embeds", FLOAT, ["texts", sizes.embed_dim])
        self.words = writer.input("words", FLOAT, ["texts", "length", sizes.text_width])
        mask = writer.input("word_mask", FLOAT, ["texts", "length"])
        self.mask = writer.node("Cast", "key_mask", [mask], attributes={"to": INT32})
        # How often one image's values are needed: once for each text.
        count = writer.node("Shape", "texts", [self.text], attributes={"start": 0, "end": 1})
        ones = writer.constant("ones", np.ones(3, np.int64))
        self.repeats = writer.node("Concat", "repeats", [count, ones], attributes={"axis": 0})

    def build(self) -> None:
        dim, side = self.sizes.dim, self.sizes.grid
        rows = self.net.rows("joined", self._pyramid(), dim)
        seen = self._decoder(rows)
        self._projected(self.net.grid("seen", seen, dim, side))

    def _pyramid(self) -> str:
        """The levels joined with the text, ``[texts, dim, grid, grid]``."""
        net, writer, joins = self.net, self.writer, self.spec.joins()
        deepest = self.sizes.pyramid[2]
        matrix = net.weights.matrix("neck.txt_proj.0.weight", deepest, self.sizes.embed_dim)
        state = linear(writer, "neck.txt_proj.0", self.text, matrix, net.accuracy_level)
        state = net.relu("neck.txt_proj", net.batch_norm("neck.txt_proj.1", state, deepest))
        factor = net.reshape("state", state, [0, deepest, 1, 1])
        f5 = writer.node("Mul", "neck.asked", [self.levels["level_5"], factor])
        f5 = net.relu("neck.norm_layer", net.batch_norm("neck.norm_layer.0", f5, deepest))
        f4 = self._joined("f4", [self._repeated("level_4"), self._doubled("f5", f5)])
        f4 = net.convolved(joins["f2_cat"], f4)
        f3 = self._joined("f3", [self._repeated("level_3"), f4])
        f3 = net.convolved(joins["f3_cat"], f3)
        parts = [
            net.convolved(joins["f4_proj3"], f3),
            net.convolved(joins["f4_proj4"], f4),
            self._doubled("fq5", net.convolved(joins["f4_proj5"], f5)),
        ]
        x = net.convolved(joins["aggr"], self._joined("levels", parts))
        x = self._joined("placed_grid", [x, self._coordinates()])
        return net.convolved(joins["coordconv.1"], net.convolved(joins["coordconv.0.conv1"], x))

    def _coordinates(self) -> str:
        """Each cell's place from left to right and from top to bottom, in -1..1, for every text."""
        side = np.linspace(-1, 1, self.sizes.grid, dtype=np.float32)
        down, across = np.meshgrid(side, side, indexing="ij")
        stored = self.writer.weight("coordinates", np.stack([across, down])[None])
        return self.writer.node("Expand", "cell_places", [stored, self.repeats])

    def _repeated(self, name: str) -> str:
        return self.writer.node("Expand", f"{name}/texts", [self.levels[name], self.repeats])

    def _joined(self, name: str, parts: list[str]) -> str:
        return self.writer.node("Concat", f"{name}/joined", parts, attributes={"axis": 1})

    def _doubled(self, name: str, x: str) -> str:
        """Bilinear, twice as large."""
        scales = self.writer.constant("doubled", np.array([1, 1, 2, 2], np.float32))
        attributes = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.writer.node("Resize", f"{name}/doubled", [x, "", scales], attributes=attributes)

    def _decoder(self, x: str) -> str:
        """Rows ``[texts, cells, dim]`` after they have seen the words."""
        net, writer, sizes = self.net, self.writer, self.sizes
        dim, side = sizes.dim, sizes.grid
        half = _waves(dim // 2, side)
        across = np.broadcast_to(half, (side, side, dim // 2))
        down = np.broadcast_to(half[:, None], (side, side, dim // 2))
        cells = np.concatenate([across, down], axis=-1).reshape(1, side * side, dim)
        self.cells = writer.weight("cell_waves", np.ascontiguousarray(cells))
        table = writer.weight("word_waves", _waves(dim, sizes.context_length))
        zero, one = (writer.constant(f"words.{n}", np.array([n], np.int64)) for n in (0, 1))
        length = writer.node("Shape", "word_count", [self.words], attributes={"start": 1, "end": 2})
        places = writer.node("Slice", "word_places", [table, zero, length, zero, one])
        self.keys = writer.node("Add", "placed_words", [self.words, places])
        for layer in range(sizes.num_layers):
            x = self._layer(f"decoder.layers.{layer}.", x)
        return net.layer_norm("decoder.norm", x, dim)

    def _layer(self, at: str, x: str) -> str:
        net, writer, sizes = self.net, self.writer, self.sizes
        dim, inner = sizes.dim, sizes.dim_ffn
        normed = net.layer_norm(f"{at}norm1", x, dim)
        asked = writer.node("Add", f"{at}placed1", [normed, self.cells])
        found = self._attention(f"{at}self_attn", (asked, asked, normed), [])
        found = net.layer_norm(f"{at}self_attn_norm", found, dim)
        x = writer.node("Add", f"{at}attended", [x, found])
        normed = net.layer_norm(f"{at}norm2", x, dim)
        asked = writer.node("Add", f"{at}placed2", [normed, self.cells])
        found = self._attention(f"{at}multihead_attn", (asked, self.keys, self.words), [self.mask])
        found = net.layer_norm(f"{at}cross_attn_norm", found, dim)
        x = writer.node("Add", f"{at}seen", [x, found])
        wide = net.layer(f"{at}ffn.0", net.layer_norm(f"{at}norm3", x, dim), inner, dim)
        wide = net.layer_norm(f"{at}ffn.3", net.relu(f"{at}ffn", wide), inner)
        return writer.node("Add", f"{at}sum", [x, net.layer(f"{at}ffn.4", wide, dim, inner)])

    def _attention(self, name: str, parts: tuple[str, str, str], mask: list[str]) -> str:
        dim = self.sizes.dim
        values, bias = self.net.projected(name, parts, dim)
        found = self.net.attend(name, [*values, bias, *mask], self.sizes.num_head, dim)
        return self.net.layer(f"{name}.out_proj", found, dim, dim)

    def _projected(self, grid: str) -> None:
        """The mask: a convolution whose kernel is made of the text.

        A grouped convolution would need the number of texts in the graph. Instead each of the nine taps
        gives a map of its own, as a matrix product; a fixed convolution shifts them and adds them up.
        """
        net, writer, kernel = self.net, self.writer, self.sizes.dim // 2
        first, second = self.spec.upsampled()
        x = net.convolved(first, self._doubled("proj.1", grid))
        x = net.convolved(second, self._doubled("proj.3", x))
        stored = net.weights.array("proj.vis.4.weight", (kernel, kernel, 1, 1))
        inputs = [x, float_weight(writer, "proj.vis.4.weight", stored)]
        inputs.append(net.vector("proj.vis.4.bias", kernel))
        x = writer.node("Conv", "proj.vis.4", inputs, attributes={"kernel_shape": [1, 1]})
        made = net.layer("proj.txt", self.text, kernel * TAPS + 1, self.sizes.embed_dim)
        weight, bias = self._parts(made, kernel)
        maps = writer.node("MatMul", "taps", [weight, net.reshape("maps", x, [0, kernel, -1])])
        side = 4 * self.sizes.grid
        taps = net.reshape("tap_maps", maps, [0, TAPS, side, side])
        shift = np.eye(TAPS, dtype=np.float32).reshape(1, TAPS, 3, 3)
        attributes = {"kernel_shape": [3, 3], "pads": [1] * 4}
        shifts = writer.weight("tap_shifts", shift)
        summed = writer.node("Conv", "shifted", [taps, shifts], attributes=attributes)
        rows = net.reshape("summed", summed, [0, side, side])
        logits = writer.output("logits", FLOAT, ["texts", side, side])
        writer.node("Add", "mask", [rows, bias], outputs=[logits])

    def _parts(self, made: str, kernel: int) -> tuple[str, str]:
        """The text's kernel by taps ``[texts, taps, channels]``, and its bias ``[texts, 1, 1]``."""
        writer = self.writer
        cuts = writer.constant("kernel_and_bias", np.array([kernel * TAPS, 1], np.int64))
        names = ["text_kernel", "text_bias"]
        writer.node("Split", "made", [made, cuts], outputs=names, attributes={"axis": 1})
        channels = self.net.reshape("kernel_channels", names[0], [0, kernel, TAPS])
        turn = {"perm": [0, 2, 1]}
        taps = writer.node("Transpose", "kernel_taps", [channels], attributes=turn)
        return taps, self.net.reshape("bias_rows", names[1], [0, 1, 1])


def _waves(dim: int, length: int) -> NDArray[np.float32]:
    """Sines and cosines in turn, ``[length, dim]``, in float32 as torch computes them."""
    step = np.float32(-(np.log(BASE) / dim))
    rates = np.exp(np.arange(0, dim, 2, dtype=np.float32) * step)
    angles = np.arange(length, dtype=np.float32)[:, None] * rates
    both = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return both.reshape(length, dim).astype(np.float32)
