"""Attention of positions that see beyond themselves, or not all before them, in onnxruntime's ops.

GroupQueryAttention looks back only, within its window if it has one. Here is what is added to its scores,
and attention with a mask for the first positions, in whose place its own rows are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.attention import attention
from exporter.graphs.dialect import Reach
from exporter.graphs.writer import GraphWriter


class ReachMasks:
    """What follows from `Reach` in one decoder graph; each value is made once, or once a window."""

    def __init__(self, writer: GraphWriter) -> None:
        self._writer = writer
        self._one = writer.constant("one", np.array([1], np.int64))
        self._ahead = ""
        self._windows: dict[int, str] = {}
        self._first: dict[int, str] = {}

    def ahead(self, reach: Reach) -> str:
        """How many of the first positions hold all that see beyond themselves, int64 ``[1]``."""
        if not self._ahead:
            node = self._writer.node
            ahead = node("Less", "looks_ahead", [reach.place, reach.last])
            behind = node("Add", "behind_last", [reach.last, self._number(1)])
            ends = node("Where", "ahead_ends", [ahead, behind, self._number(0)])
            most = node("ReduceMax", "ahead_end", [ends], attributes={"keepdims": 0})
            self._ahead = node("Reshape", "ahead_length", [most, self._one])
        return self._ahead

    def window(self, reach: Reach) -> str:
        """What is added to the scores of all keys, past ones too, ``[batch, 1, sequence, total]``."""
        if reach.window not in self._windows:
            name, ends = f"window.{reach.window}", {"start": 1, "end": 2}
            total = self._writer.node("Shape", f"{name}.total", ["attention_mask"], attributes=ends)
            within = self._within(name, self._keys(name, total), reach.place, reach.window)
            self._windows[reach.window] = self._added(name, within)
        return self._windows[reach.window]

    def first(self, reach: Reach) -> str:
        """What is added to the scores of the first positions among themselves."""
        if reach.window not in self._first:
            node, name, length = self._writer.node, f"ahead.{reach.window}", self.ahead(reach)
            start = self._constant("reach.start", [0])
            last, place = (
                node("Slice", f"{name}.{n}", [x, start, length, self._one])
                for n, x in (("last", reach.last), ("place", reach.place))
            )
            # Place and number of a key are one: there is no past, and padding is on the right.
            keys = self._keys(name, length)
            seen = node("GreaterOrEqual", f"{name}.up_to_last", [self._column(last, name), keys])
            if reach.window:
                within = self._within(name, keys, place, reach.window)
                seen = node("And", f"{name}.seen", [seen, within])
            self._first[reach.window] = self._added(name, seen)
        return self._first[reach.window]

    def _keys(self, name: str, length: str) -> str:
        """Numbers of the first keys, as many as `length` int64 ``[1]`` says."""
        end = self._writer.node("Squeeze", f"{name}.end", [length])
        ends = [self._number(0), end, self._number(1)]
        return self._writer.node("Range", f"{name}.keys", ends)

    def _within(self, name: str, keys: str, place: str, window: int) -> str:
        """Whether a key is within the window of a place or behind it."""
        node, size = self._writer.node, self._constant(f"{name}.size", window)
        before = node("Sub", f"{name}.before", [self._column(place, f"{name}.place"), size])
        return node("Less", f"{name}.within", [before, keys])

    def _column(self, x: str, name: str) -> str:
        axes = self._constant("reach.axes", [1, 3])
        return self._writer.node("Unsqueeze", f"{name}_column", [x, axes])

    def _added(self, name: str, seen: str) -> str:
        values = {"seen": 0.0, "unseen": float(np.finfo(np.float32).min)}
        scores = [
            self._writer.constant(f"reach.{key}", np.array(value, np.float32))
            for key, value in values.items()
        ]
        return self._writer.node("Where", f"{name}.added", [seen, *scores])

    def _number(self, value: int) -> str:
        return self._constant(f"reach.{value}", value)

    def _constant(self, name: str, values: int | list[int]) -> str:
        return self._writer.constant(name, np.array(values, np.int64))


def first_rows(
    writer: GraphWriter,
    spec: TextDecoder,
    name: str,
    queries_keys_values: Sequence[str],
    added: str,
) -> str:
    """Attention of the first positions ``[batch, length, heads * head_dim]`` among themselves.

    `added`: to their scores, where not all see all.
    """
    query, *keys_values = queries_keys_values
    if spec.kv_heads != spec.heads:
        keys_values = [
            _shared(writer, spec, f"{name}.{part}", x)
            for part, x in zip("kv", keys_values, strict=True)
        ]
    inputs = [query, *keys_values, *(["", "", added] if added else [])]
    return attention(writer, name, inputs, spec.heads, spec.head_dim)


def _shared(writer: GraphWriter, spec: TextDecoder, name: str, x: str) -> str:
    """Keys or values ``[batch, length, kv_heads * head_dim]``, each of them for its queries."""

    def shape(key: str, *sizes: int) -> str:
        values: NDArray[np.int64] = np.array(sizes, np.int64)
        return writer.constant(f"shared.{key}", values)

    # 0 copies a size, and Expand keeps an axis where its shape has 1.
    single = shape("single", 0, 0, spec.kv_heads, 1, spec.head_dim)
    group = shape("group", 1, 1, 1, spec.heads // spec.kv_heads, 1)
    joined = shape("joined", 0, 0, spec.heads * spec.head_dim)
    shares = writer.node(
        "Expand", f"{name}/shares", [writer.node("Reshape", f"{name}/single", [x, single]), group]
    )
    return writer.node("Reshape", f"{name}/shared", [shares, joined])
