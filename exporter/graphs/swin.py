"""A Swin tower as an ONNX graph: one gather cuts a grid into (shifted) windows, one puts it together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.families.base import VitNames, VitSpec
from exporter.families.specs.swin import (
    FIXED_EPS,
    SwinBlock,
    SwinSpec,
    SwinStage,
    merge_order,
    relative_index,
    shift_mask,
    table_name,
    window_order,
)
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter


class Swin:
    """Writes one tower into a graph; values are float32 ``[images, cells, width]``."""

    def __init__(
        self, writer: GraphWriter, spec: SwinSpec, weights: WeightSource, accuracy_level: int
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.accuracy_level = accuracy_level

    def pooled(self, pixels: str) -> str:
        """Mean of the normed cells of the last stage, ``[images, output_size]``."""
        spec, writer = self.spec, self.writer
        stem = self._vit(spec.embed_dim, spec.heads[0], FIXED_EPS)
        rows = stem.patches(pixels, bias=True)
        x, _ = stem.norm(f"{spec.prefix}embeddings.norm", Stream(rows))
        for stage in spec.stages():
            vit = self._vit(stage.width, stage.heads, spec.norm_eps)
            stream = Stream(x)
            for block in stage.blocks:
                stream = self._block(vit, stage, block, stream)
            if stage.merge:
                x = self._merged(stage, vit.total(f"{stage.merge}states", stream))
        normed, _ = vit.norm(f"{spec.prefix}layernorm", stream, last=True)
        axis = writer.constant("cells", np.array([1], np.int64))
        return writer.node("ReduceMean", "pooled", [normed, axis], attributes={"keepdims": 0})

    def _block(self, vit: Vit, stage: SwinStage, block: SwinBlock, x: Stream) -> Stream:
        """Attention within windows, then the MLP, each behind its norm and added to the residual."""
        at, width, inner = block.name, stage.width, self.spec.inner(stage.width)
        normed, residual = vit.norm(f"{at}layernorm_before", x)
        attended = self._attention(vit, stage, block, normed)
        product = vit.product(f"{at}attention.o_proj", f"{at}attention.o_proj", attended)
        normed, residual = vit.norm(f"{at}layernorm_after", Stream(residual, *product))
        wide, bias = vit.product(f"{at}mlp.fc1", f"{at}mlp.fc1", normed, (inner, width))
        active = vit.activate(f"{at}mlp.active", self.spec.activation, wide, bias)
        return Stream(
            residual, *vit.product(f"{at}mlp.fc2", f"{at}mlp.fc2", active, (width, inner))
        )

    def _attention(self, vit: Vit, stage: SwinStage, block: SwinBlock, x: str) -> str:
        """Attention of each window's tokens to one another, in the grid's own order again."""
        writer, at, size = self.writer, f"{block.name}attention.", stage.width // stage.heads
        order = window_order(stage.side, self.spec.window, block.shift)
        orders = f"{stage.side}.{block.shift}.order"
        cut = self._gather(f"{at}windows", orders, x, order)
        query, key, value = (self._heads(vit, stage, at, part, cut) for part in "qkv")
        factor = writer.constant(f"{size}.scale", np.array([size**-0.5], np.float32))
        query = writer.node("Mul", f"{at}scaled", [query, factor])
        scores = writer.node("MatMul", f"{at}products", [query, key])
        scores = self._placed(stage, block, scores)
        seen = writer.node("Softmax", f"{at}softmax", [scores], attributes={"axis": -1})
        found = writer.node("MatMul", f"{at}seen", [seen, value])
        turn = {"perm": [0, 1, 3, 2, 4]}
        turned = writer.node("Transpose", f"{at}turn", [found], attributes=turn)
        rows = vit.reshape(f"{at}rows", turned, [-1, stage.side**2, stage.width])
        return self._gather(f"{at}grid", f"{orders}.back", rows, np.argsort(order))

    def _heads(self, vit: Vit, stage: SwinStage, at: str, part: str, x: str) -> str:
        """Heads of each window, ``[images, windows, heads, tokens, head_dim]``, keys with the last two
        axes swapped.
        """
        name = f"{at}{part}_proj"
        product, bias = vit.product(name, name, x)
        whole = self.writer.node("Add", f"{name}/bias", [product, bias])
        tokens = self.spec.window**2
        shape = [-1, stage.side**2 // tokens, tokens, stage.heads, stage.width // stage.heads]
        target = self.writer.constant(f"{stage.width}.windows.shape", np.array(shape, np.int64))
        split = self.writer.node("Reshape", f"{name}/heads", [whole, target])
        perm = [0, 1, 3, 4, 2] if part == "k" else [0, 1, 3, 2, 4]
        return self.writer.node("Transpose", f"{name}/turn", [split], attributes={"perm": perm})

    def _placed(self, stage: SwinStage, block: SwinBlock, scores: str) -> str:
        """Scores with the relative positions, and apart what the shift alone brought together."""
        writer, window = self.writer, self.spec.window
        name = table_name(block.name)
        table = self.weights.array(name, ((2 * window - 1) ** 2, stage.heads))
        bias = np.ascontiguousarray(table[relative_index(window)].transpose(2, 0, 1))
        added = float_weight(writer, name, bias)
        scores = writer.node("Add", f"{block.name}attention.placed", [scores, added])
        if not block.shift:
            return scores
        mask = f"{stage.side}.apart"
        values = shift_mask(stage.side, window, block.shift)
        return writer.node(
            "Add", f"{block.name}attention.apart", [scores, writer.constant(mask, values)]
        )

    def _merged(self, stage: SwinStage, x: str) -> str:
        """Four neighbours as one cell of twice the width, ``[images, cells / 4, 2 * width]``."""
        wide = 4 * stage.width
        order = merge_order(stage.side)
        fours = self._gather(f"{stage.merge}fours", f"{stage.side}.fours", x, order)
        vit = self._vit(wide, 1, FIXED_EPS)
        joined = vit.reshape(f"{stage.merge}joined", fours, [-1, stage.side**2 // 4, wide])
        normed, _ = vit.norm(f"{stage.merge}norm", Stream(joined))
        matrix = self.weights.matrix(f"{stage.merge}reduction.weight", 2 * stage.width, wide)
        return vit.multiply(f"{stage.merge}reduction", normed, matrix)

    def _gather(self, name: str, orders: str, x: str, order: NDArray[np.int64]) -> str:
        """The cells of `x` in another order, which blocks share by the name `orders`."""
        if np.array_equal(order, np.arange(len(order))):
            return x
        index = self.writer.constant(orders, order)
        return self.writer.node("Gather", name, [x, index], attributes={"axis": 1})

    def _vit(self, width: int, heads: int, eps: float) -> Vit:
        """What vision transformers share, for values of `width`."""
        spec = self.spec
        shared = VitSpec(
            hidden_size=width,
            layers=0,
            heads=heads,
            intermediate_size=spec.inner(width),
            patch_size=spec.patch_size,
            image_size=spec.image_size,
            norm_eps=eps,
            activation=spec.activation,
            prefix=spec.prefix,
            names=VitNames(patch="embeddings.patch_embeddings.projection"),
        )
        return Vit(self.writer, shared, self.weights, self.accuracy_level)
