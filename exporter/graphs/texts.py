"""What the decoder graphs of all kinds have in common: inputs, lengths, places, causal attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.errors import InputRefused
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.gpt2 import cross_names
from exporter.graphs.dialect import OpenDialect, Reach, TextOps
from exporter.graphs.layers import Layers
from exporter.graphs.linear import linear
from exporter.graphs.reach import ReachMasks, first_rows
from exporter.graphs.writer import MICROSOFT, GraphWriter

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
LAST = np.iinfo(np.int64).max
# GroupQueryAttention's own bound.
HEAD_MULTIPLE = 8
# Number of its input that is added to scores.
ADDED_SCORES = 10


def check_heads(spec: TextDecoder, dialect: OpenDialect | None = None) -> None:
    """Raise `InputRefused` when the attention op, without rotary, cannot do the head size."""
    if dialect is None and spec.head_dim % HEAD_MULTIPLE:
        raise InputRefused(
            f"config.json: heads of {spec.head_dim}; onnxruntime's GroupQueryAttention needs a multiple "
            f"of {HEAD_MULTIPLE}, this model cannot be exported for it"
        )


class TextGraph:
    """Declares inputs_embeds, attention_mask, num_logits_to_keep, logits and, with each `attention`,
    past and present, as `graphs.decoder.write_decoder` says them.
    """

    def __init__(
        self, writer: GraphWriter, spec: TextDecoder, vocabulary: int | None = None
    ) -> None:
        """`vocabulary`: width of the logits where it is not the spec's own."""
        self._writer, self._spec = writer, spec
        batch = "batch_size"
        shape: list[int | str] = [batch, "sequence_length", spec.hidden_size]
        self.embeds = writer.input("inputs_embeds", FLOAT, shape)
        writer.input("attention_mask", INT64, [batch, "total_sequence_length"])
        writer.input("num_logits_to_keep", INT64, [])
        self.logits = writer.output(
            "logits", FLOAT, [batch, "kept_length", vocabulary or spec.vocab_size]
        )
        self._ops: TextOps = (
            _SharedBuffers(writer, spec) if writer.dialect is None else writer.dialect.text(spec)
        )

    def places(self) -> str:
        """The place of every position in its row's text, int64 ``[batch, sequence]``.

        A prompt padded on the right has fewer valid positions than it is long and begins at 0; later
        positions are all valid and follow the past.
        """
        return self._ops.places()

    def placed(self, table: NDArray[Any]) -> str:
        """The embeddings with the learned positions ``[max_positions, hidden]`` of their places."""
        writer = self._writer
        stored = writer.weight("positions.weight", table)
        rows = writer.node("Gather", "positions", [stored, self.places()])
        if table.dtype != np.float32:
            # After the lookup: only the rows asked for become float32.
            rows = writer.node("Cast", "positions/cast", [rows], attributes={"to": FLOAT})
        return writer.node("Add", "placed", [self.embeds, rows])

    def image(self, layer: int) -> list[str]:
        """Inputs cross_key_values.{layer}.key|value, as the vision graph gives them."""
        spec = self._spec
        shape: list[int | str] = ["batch_size", spec.heads, "image_rows", spec.head_dim]
        names = cross_names(spec.layers)[2 * layer : 2 * layer + 2]
        return [self._writer.input(name, FLOAT, shape) for name in names]

    def keep(self, name: str, x: str) -> str:
        """The positions of `x` whose logits are asked for."""
        return self._ops.keep(name, x)

    def wanted(self, layer: int, name: str, x: str) -> str:
        """`x` from behind the attention of `layer`: of the last one, what `keep` keeps, as no position
        needs another from there on.
        """
        return x if layer < self._spec.layers - 1 else self.keep(name, x)

    def head(self, layers: Layers, x: str) -> None:
        """The logits of `x`: by the head's own matrix where the folder has one, else by the embedding
        of a tied model.
        """
        spec, weights = self._spec, layers.weights
        shared = spec.tied and not weights.has(spec.head)
        name = spec.embedding if shared else spec.head
        matrix = weights.matrix(name, spec.vocab_size, spec.hidden_size, again=shared)
        linear(self._writer, "head", x, matrix, layers.accuracy_level, output=self.logits)

    def attention(
        self,
        layer: int,
        queries_keys_values: Sequence[str],
        tables: Sequence[str] = (),
        prefix: str = "",
        reach: Reach | None = None,
    ) -> str:
        """Causal attention; one packed value stands first where it holds all three. With `tables`
        (cosines, sines) the op turns queries and keys itself. `prefix` int64 ``[1]``, not with a packed
        value: so many of the first positions of an empty past see each other both ways. `reach`,
        neither with a packed value nor with a prefix: which keys are seen, the same values in all
        layers but for the window.
        """
        return self._ops.attention(layer, queries_keys_values, tables, prefix, reach)


class _SharedBuffers:
    """`TextOps` of GroupQueryAttention, whose past and present may be one buffer."""

    def __init__(self, writer: GraphWriter, spec: TextDecoder) -> None:
        self._writer, self._spec = writer, spec
        self._masks = ReachMasks(writer)
        self._one = writer.constant("one", np.array([1], np.int64))
        self._last = writer.constant("last", np.array([LAST], np.int64))
        self._lengths()
        # Slicing from -n keeps n positions; from -0 = 0 it keeps all.
        kept = writer.node("Neg", "keep_from", ["num_logits_to_keep"])
        self._starts = writer.node("Reshape", "keep_starts", [kept, self._one])

    def _lengths(self) -> None:
        # seqlens_k: index of each row's last valid key; total: length of the mask, past included.
        writer, mask = self._writer, "attention_mask"
        keep = {"keepdims": 0}
        self._valid = writer.node("ReduceSum", "valid", [mask, self._one], attributes=keep)
        last = writer.node("Sub", "last_valid", [self._valid, self._one])
        self._seqlens = writer.node("Cast", "seqlens_k", [last], attributes={"to": INT32})
        shape = writer.node("Shape", "mask_length", [mask], attributes={"start": 1, "end": 2})
        scalar = writer.node("Squeeze", "mask_scalar", [shape])
        self._total = writer.node("Cast", "total_length", [scalar], attributes={"to": INT32})

    def places(self) -> str:
        writer = self._writer
        ends = {"start": 1, "end": 2}
        axis = writer.node("Shape", "new_length", ["inputs_embeds"], attributes=ends)
        length = writer.node("Squeeze", "new_scalar", [axis])
        before = writer.node("Sub", "past_or_padding", [self._valid, length])
        zero, one = (writer.constant(f"places.{n}", np.array(n, np.int64)) for n in (0, 1))
        first = writer.node("Max", "past_length", [before, zero])
        column = writer.node("Unsqueeze", "past_column", [first, self._one])
        steps = writer.node("Range", "new_places", [zero, length, one])
        return writer.node("Add", "places", [column, steps])

    def keep(self, name: str, x: str) -> str:
        return self._writer.node("Slice", name, [x, self._starts, self._last, self._one])

    def attention(
        self,
        layer: int,
        queries_keys_values: Sequence[str],
        tables: Sequence[str],
        prefix: str,
        reach: Reach | None,
    ) -> str:
        writer, spec = self._writer, self._spec
        name, parts = f"layers.{layer}.attention", ("key", "value")
        shape: list[int | str] = [
            "batch_size",
            spec.kv_heads,
            "past_sequence_length",
            spec.head_dim,
        ]
        past = [writer.input(f"past_key_values.{layer}.{p}", FLOAT, shape) for p in parts]
        shape[2] = "present_sequence_length"
        present = [writer.output(f"present.{layer}.{p}", FLOAT, shape) for p in parts]
        inputs = [*queries_keys_values, *past, self._seqlens, self._total, *tables]
        if reach and reach.window:
            # Before onnxruntime 1.24 the op's window is one key longer (its pull request 25927): what is
            # added to the scores hides that one.
            inputs += [""] * (ADDED_SCORES - len(inputs)) + [self._masks.window(reach)]
        writer.node(
            "GroupQueryAttention",
            name,
            inputs,
            domain=MICROSOFT,
            outputs=[f"{name}:0", *present],
            attributes={
                "num_heads": spec.heads,
                "kv_num_heads": spec.kv_heads,
                "scale": float(np.float32(spec.head_dim**-0.5)),
                "do_rotary": int(bool(tables)),
                **({"local_window_size": reach.window} if reach and reach.window else {}),
            },
        )
        causal, added = f"{name}:0", ""
        if reach:
            prefix, added = self._masks.ahead(reach), self._masks.first(reach)
        if not prefix:
            return causal
        return self._both_ways(name, queries_keys_values, causal, prefix, added)

    def _both_ways(
        self,
        name: str,
        queries_keys_values: Sequence[str],
        causal: str,
        prefix: str,
        added: str,
    ) -> str:
        """Rows of `causal`, the first ones replaced by those of attention without a mask, or with what
        is `added` to the scores.
        """
        writer, spec = self._writer, self._spec
        zero = writer.constant("prefix.zero", np.array([0], np.int64))
        first = [
            writer.node("Slice", f"{name}.first_{part}", [rows, zero, prefix, self._one])
            for part, rows in zip("qkv", queries_keys_values, strict=True)
        ]
        both = first_rows(writer, spec, f"{name}.both_ways", first, added)
        ends = [causal, prefix, self._last, self._one]
        later = writer.node("Slice", f"{name}.later", ends)
        return writer.node("Concat", f"{name}.joined", [both, later], attributes={"axis": 1})
