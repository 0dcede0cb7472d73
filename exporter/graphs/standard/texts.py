"""Causal attention of primitive operators: an explicit mask, keys and values by concatenation.

The mask says of every place by itself whether it counts; padding stays where it is. A place's
position is the number of ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.dialect import Dialect, Reach
from exporter.graphs.standard.ops import HIDDEN, Ops
from exporter.graphs.writer import GraphWriter

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
TOTAL = "total_sequence_length"


class Concatenated:
    """`graphs.dialect.TextOps` whose present is past with the new keys and values behind it."""

    def __init__(self, writer: GraphWriter, spec: TextDecoder, dialect: Dialect) -> None:
        self.writer, self.spec, self._dialect = writer, spec, dialect
        self.ops = Ops(writer)
        self._places = ""
        self._masks: dict[int, str] = {}
        # New places (int64 [1]) and all places of a row (scalar).
        shape, node = {"start": 1, "end": 2}, writer.node
        new = node("Shape", "new_length", ["inputs_embeds"], attributes=shape)
        total = node("Shape", "total_length", ["attention_mask"], attributes=shape)
        self._past = node("Sub", "past_length", [total, new])
        self._total = node("Squeeze", "total_scalar", [total, self.ops.whole(0)])
        self._count()
        # From -n on there are n positions; from -0 = 0 on, all. (No Neg: TensorRT computes lengths
        # by elementwise layers.)
        zero = writer.constant("zero", np.array(0, np.int64))
        start = node("Sub", "keep_from", [zero, "num_logits_to_keep"])
        self._kept = self.ops.reshape("keep_start", start, 1)

    def _count(self) -> None:
        """Ones before each place, float32: of all of them and of the new ones."""
        node, ops = self.writer.node, self.ops
        # In float32, exact to 2**24: TensorRT's CumSum has no integers.
        ones = node("Cast", "mask_float", ["attention_mask"], attributes={"to": FLOAT})
        axis = self.writer.constant("mask_axis", np.array(1, np.int64))
        counted = node("CumSum", "counted", [ones, axis])
        self._before = node("Sub", "before", [counted, ops.number(1.0)])
        self._new = ops.slice("before_new", self._before, self._past, axis=1)

    def places(self) -> str:
        """The place of every position in its row's text, int64 ``[batch, sequence]``."""
        if not self._places:
            # Padding before the first one has no position; any does.
            zero = self.ops.number(0.0)
            positive = self.writer.node("Max", "not_negative", [self._new, zero])
            whole = {"to": INT64}
            self._places = self.writer.node("Cast", "position_rows", [positive], attributes=whole)
        return self._places

    def keep(self, name: str, x: str) -> str:
        """The positions of `x` ``[batch, sequence, width]`` whose logits are asked for."""
        return self.ops.slice(name, x, self._kept, axis=1)

    def attention(
        self,
        layer: int,
        queries_keys_values: Sequence[str],
        tables: Sequence[str],
        prefix: str,
        reach: Reach | None,
    ) -> str:
        """Attention of block `layer`; see `graphs.texts.TextGraph.attention`."""
        spec, name, width = self.spec, f"layers.{layer}", self.spec.head_dim
        query, key, value = self._parts(name, queries_keys_values)
        if tables:
            turns, sizes = self._dialect.looked_up(tables, self.places()), (width, width)
            query = self._dialect.turned(f"{name}.q_rotary", query, turns, spec.heads, sizes)
            key = self._dialect.turned(f"{name}.k_rotary", key, turns, spec.kv_heads, sizes)
        query = self.ops.heads(f"{name}.q", query, spec.heads, width)
        query = self.writer.node("Mul", f"{name}.q_scaled", [query, self.ops.number(width**-0.5)])
        keys, values = (
            self._appended(
                layer, part, self.ops.heads(f"{name}.{part[0]}", x, spec.kv_heads, width)
            )
            for part, x in (("key", key), ("value", value))
        )
        mask, inner = self._visible(prefix, reach), spec.heads * width
        return self.ops.attention(f"{name}.attention", query, keys, values, inner, mask)

    def _parts(self, name: str, given: Sequence[str]) -> Sequence[str]:
        """Queries, keys and values apart."""
        if given[1]:
            return given
        spec = self.spec
        sizes = [spec.heads * spec.head_dim, *[spec.kv_heads * spec.head_dim] * 2]
        parts, axis = [f"{name}.qkv/{p}" for p in "qkv"], {"axis": -1}
        ends = [given[0], self.ops.whole(*sizes)]
        self.writer.node("Split", f"{name}.qkv/parts", ends, outputs=parts, attributes=axis)
        return parts

    def _visible(self, prefix: str, reach: Reach | None) -> str:
        """What is added to scores ``[batch, 1, sequence, total]``: 0 for keys that a place sees.

        Once in a graph, or once for each window.
        """
        window = reach.window if reach else 0
        if window not in self._masks:
            seen = self._reached(reach) if reach else self._before_each(prefix)
            self._masks[window] = self._added(seen, f"window.{window}/masked" if window else "mask")
        return self._masks[window]

    def _before_each(self, prefix: str) -> str:
        """Whether a key stands before a place, or both are of the prefix."""
        node, ops = self.writer.node, self.ops
        zero = self.writer.constant("zero", np.array(0, np.int64))
        one = self.writer.constant("one", np.array(1, np.int64))
        places = node("Range", "places", [zero, self._total, one])
        new = ops.slice("new_places", places, self._past, axis=0)
        rows = node("Unsqueeze", "new_rows", [new, ops.whole(1)])
        seen = node("GreaterOrEqual", "causal", [rows, places])
        if prefix:
            # By the place in the text, so that padding may stand before it.
            length = node("Cast", "prefix_float", [prefix], attributes={"to": FLOAT})
            keys = node("Less", "prefix_keys", [self._before, length])
            queries = node("Less", "prefix_queries", [self._new, length])
            across = node("Unsqueeze", "prefix_row", [keys, ops.whole(1)])
            down = node("Unsqueeze", "prefix_column", [queries, ops.whole(2)])
            both = node("And", "prefix_pairs", [down, across])
            seen = node("Or", "causal_or_prefix", [seen, both])
            seen = node("Unsqueeze", "seen_heads", [seen, ops.whole(1)])
        return seen

    def _reached(self, reach: Reach) -> str:
        """Whether a key lies within the reach of a place, by their places in the text."""
        node, ops, name = self.writer.node, self.ops, f"reach.{reach.window}"
        keys = node("Unsqueeze", f"{name}/keys", [self._before, ops.whole(1, 2)])
        last, place = (
            node(
                "Unsqueeze",
                f"{name}/{n}",
                [node("Cast", f"{name}/{n}_float", [x], attributes={"to": FLOAT}), ops.whole(1, 3)],
            )
            for n, x in (("last", reach.last), ("place", reach.place))
        )
        seen = node("LessOrEqual", f"{name}/up_to_last", [keys, last])
        if not reach.window:
            return seen
        before = node("Sub", f"{name}/before_window", [place, ops.number(reach.window)])
        within = node("Greater", f"{name}/within", [keys, before])
        return node("And", f"{name}/seen", [seen, within])

    def _added(self, seen: str, name: str) -> str:
        """What is added to scores where only keys that are `seen` and no padding count."""
        node, ops = self.writer.node, self.ops
        counts = node("Cast", f"{name}/bool", ["attention_mask"], attributes={"to": BOOL})
        valid = node("Unsqueeze", f"{name}/keys", [counts, ops.whole(1, 2)])
        both = node("And", f"{name}/seen", [seen, valid])
        return node("Where", name, [both, ops.number(0.0), ops.number(HIDDEN)])

    def _appended(self, layer: int, part: str, new: str) -> str:
        """All keys or values ``[batch, heads, total, head_dim]``, each of them for its queries."""
        writer, spec, ops = self.writer, self.spec, self.ops
        shape: list[int | str] = ["batch_size", spec.kv_heads, "past_sequence_length"]
        past = writer.input(f"past_key_values.{layer}.{part}", FLOAT, [*shape, spec.head_dim])
        shape[2] = TOTAL
        present = writer.output(f"present.{layer}.{part}", FLOAT, [*shape, spec.head_dim])
        name, axis = f"layers.{layer}.{part}", {"axis": 2}
        writer.node("Concat", name, [past, new], outputs=[present], attributes=axis)
        group = spec.heads // spec.kv_heads
        if group == 1:
            return present
        single = writer.node("Unsqueeze", f"{name}/single", [present, ops.whole(2)])
        # Expand keeps an axis where its shape has 1.
        shared = writer.node("Expand", f"{name}/shared", [single, ops.whole(1, 1, group, 1, 1)])
        return ops.reshape(f"{name}/shares", shared, 0, spec.heads, -1, spec.head_dim)
