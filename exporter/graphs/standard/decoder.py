"""The Llama decoder of primitive operators: an explicit mask, keys and values by concatenation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.graphs.decoder import NAME
from exporter.graphs.matrices import Matrix
from exporter.graphs.rotary import rotary_tables
from exporter.graphs.standard.linear import Weights
from exporter.graphs.standard.ops import HIDDEN, Ops
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
TOTAL = "total_sequence_length"


def write_decoder(
    folder: Path, spec: DecoderSpec, weights: WeightSource, widened: dict[str, str]
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs have the names, types and shapes of the ort dialect's graph
    (`graphs.decoder.write_decoder`), but present is past with the new keys and values behind it, and
    attention_mask says of each of these places by itself whether it counts: zeros may stand
    anywhere, and stay where they are. A place's position is the number of ones before it. Matrices
    stored wider than they came are added to `widened` with the reason. Raises `InputRefused` when
    tensors are missing or of other shapes, or the decoder has positions of several axes.
    """
    if spec.mrope:
        raise InputRefused(
            "this decoder has positions of several axes (M-RoPE), which the standard dialect does not "
            "write yet; export with --dialect ort"
        )
    with GraphWriter(folder, NAME, contrib=False) as writer:
        llama = _Llama(writer, spec, weights)
        x, logits = llama.begin()
        for layer in range(spec.layers):
            x = llama.block(layer, x)
        x = llama.norm("final_norm", x, spec.final_norm)
        llama.matrices.product("head", x, llama.head(), output=logits)
        widened.update(llama.matrices.widened)
        return writer.finish()


class _Llama:
    """Writes pieces of one decoder; values between them are ``[batch, sequence, hidden]``."""

    def __init__(self, writer: GraphWriter, spec: DecoderSpec, weights: WeightSource) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.matrices = Weights(writer)
        self.ops = Ops(writer)
        self.shapes = spec.matrix_shapes()

    def begin(self) -> tuple[str, str]:
        """Declare the inputs and outputs that no block owns; returns inputs_embeds and logits."""
        writer, spec, batch = self.writer, self.spec, "batch_size"
        x = writer.input("inputs_embeds", FLOAT, [batch, "sequence_length", spec.hidden_size])
        writer.input("attention_mask", INT64, [batch, TOTAL])
        writer.input("num_logits_to_keep", INT64, [])
        logits = writer.output("logits", FLOAT, [batch, "kept_length", spec.vocab_size])
        self._lengths()
        self._rotary()
        self._mask()
        # From -n on there are n positions; from -0 = 0 on, all. (No Neg: TensorRT computes lengths
        # by elementwise layers.)
        zero = writer.constant("zero", np.array(0, np.int64))
        start = writer.node("Sub", "keep_from", [zero, "num_logits_to_keep"])
        self.kept = self.ops.reshape("keep_start", start, 1)
        return x, logits

    def block(self, layer: int, x: str) -> str:
        """Block `layer`: attention, then the MLP, each behind its norm and added to the residual."""
        name, node = f"layers.{layer}", self.writer.node
        at = f"{self.spec.prefix}{name}."
        normed = self.norm(f"{name}.input_norm", x, f"{at}input_layernorm.weight")
        attended = self._attention(layer, f"{at}self_attn.", normed)
        if layer == self.spec.layers - 1:
            # Behind the last attention no position needs another: drop those nobody asked for.
            attended = self.ops.slice("keep_attended", attended, self.kept, axis=1)
            x = self.ops.slice("keep_residual", x, self.kept, axis=1)
        projected = self._product(f"{name}.o_proj", f"{at}self_attn.o_proj.weight", attended)
        x = node("Add", f"{name}.attended", [x, projected])
        normed = self.norm(f"{name}.post_norm", x, f"{at}post_attention_layernorm.weight")
        gate, up = (
            self._product(f"{name}.{part}", f"{at}mlp.{part}_proj.weight", normed)
            for part in ("gate", "up")
        )
        gated = node("Mul", f"{name}.gated", [self.ops.swish(f"{name}.silu", gate), up])
        down = self._product(f"{name}.down", f"{at}mlp.down_proj.weight", gated)
        return node("Add", f"{name}.out", [x, down])

    def norm(self, name: str, x: str, gamma: str) -> str:
        """RMS norm with the weight `gamma`."""
        values = self.weights.vector(gamma, self.spec.hidden_size)
        return self.ops.rms_norm(name, x, values, self.spec.norm_eps)

    def head(self) -> Matrix:
        """The head's own matrix where the folder has one, else the embedding of a tied model."""
        spec = self.spec
        tied = spec.tied and not self.weights.has(spec.head)
        name = spec.embedding if tied else spec.head
        return self.weights.matrix(name, spec.vocab_size, spec.hidden_size, again=tied)

    def _lengths(self) -> None:
        """New places (int64 ``[1]``) and all places of a row (scalar)."""
        shape = {"start": 1, "end": 2}
        node = self.writer.node
        new = node("Shape", "new_length", ["inputs_embeds"], attributes=shape)
        total = node("Shape", "total_length", ["attention_mask"], attributes=shape)
        self.past = node("Sub", "past_length", [total, new])
        self.total = node("Squeeze", "total_scalar", [total, self.ops.whole(0)])

    def _rotary(self) -> None:
        """Cosines and sines ``[batch, 1, sequence, head_dim / 2]`` of the new places."""
        writer, spec, node = self.writer, self.spec, self.writer.node
        # In float32, exact to 2**24: TensorRT's CumSum has no integers.
        ones = node("Cast", "mask_float", ["attention_mask"], attributes={"to": FLOAT})
        axis = writer.constant("mask_axis", np.array(1, np.int64))
        counted = node("CumSum", "counted", [ones, axis])
        new = self.ops.slice("counted_new", counted, self.past, axis=1)
        before = node("Sub", "before", [new, self.ops.number(1.0)])
        # Padding before the first one has no position; any does.
        positive = node("Max", "positions", [before, self.ops.number(0.0)])
        places = node("Cast", "position_ids", [positive], attributes={"to": INT64})
        tables = rotary_tables(spec.max_positions, spec.head_dim, spec.rope_theta)
        self.turns = [
            node(
                "Unsqueeze",
                f"rotary.{part}/heads",
                [
                    node(
                        "Gather",
                        f"rotary.{part}/rows",
                        [writer.weight(f"rotary.{part}", table), places],
                    ),
                    self.ops.whole(1),
                ],
            )
            for part, table in zip(("cos", "sin"), tables, strict=True)
        ]

    def _mask(self) -> None:
        """What is added to scores ``[batch, 1, sequence, total]``: 0 for keys that a place sees."""
        node, ops = self.writer.node, self.ops
        zero = self.writer.constant("zero", np.array(0, np.int64))
        one = self.writer.constant("one", np.array(1, np.int64))
        places = node("Range", "places", [zero, self.total, one])
        new = ops.slice("new_places", places, self.past, axis=0)
        rows = node("Unsqueeze", "new_rows", [new, ops.whole(1)])
        causal = node("GreaterOrEqual", "causal", [rows, places])
        counts = node("Cast", "mask_bool", ["attention_mask"], attributes={"to": BOOL})
        keys = node("Unsqueeze", "mask_keys", [counts, ops.whole(1, 2)])
        seen = node("And", "seen", [causal, keys])
        self.mask = node("Where", "mask", [seen, ops.number(0.0), ops.number(HIDDEN)])

    def _attention(self, layer: int, at: str, x: str) -> str:
        spec, name = self.spec, f"layers.{layer}"
        width = spec.head_dim
        query = self._heads(f"{name}.q_proj", f"{at}q_proj", x, spec.heads)
        query = self._turned(f"{name}.q_rotary", query)
        scale = self.ops.number(width**-0.5)
        query = self.writer.node("Mul", f"{name}.q_scaled", [query, scale])
        key = self._heads(f"{name}.k_proj", f"{at}k_proj", x, spec.kv_heads)
        key = self._appended(layer, "key", self._turned(f"{name}.k_rotary", key))
        value = self._heads(f"{name}.v_proj", f"{at}v_proj", x, spec.kv_heads)
        value = self._appended(layer, "value", value)
        inner = spec.heads * width
        return self.ops.attention(f"{name}.attention", query, key, value, inner, self.mask)

    def _heads(self, name: str, tensor: str, x: str, count: int) -> str:
        made = self._product(name, f"{tensor}.weight", x)
        if self.spec.qkv_bias:
            bias = self.weights.vector(f"{tensor}.bias", count * self.spec.head_dim)
            stored = self.writer.weight(f"{name}.bias", bias)
            made = self.writer.node("Add", f"{name}/bias", [made, stored])
        return self.ops.heads(name, made, count, self.spec.head_dim)

    def _turned(self, name: str, x: str) -> str:
        """Heads rotated by their positions (RoFormer, arXiv 2104.09864), halves against each other."""
        node, turns = self.writer.node, tuple(zip(("cos", "sin"), self.turns, strict=True))
        first, second = f"{name}:first", f"{name}:second"
        halves = {"axis": -1, "num_outputs": 2}
        node("Split", f"{name}/halves", [x], outputs=[first, second], attributes=halves)
        # first * cos - second * sin, then second * cos + first * sin
        across, along = (node("Mul", f"{name}/first_{n}", [first, t]) for n, t in turns)
        back, down = (node("Mul", f"{name}/second_{n}", [second, t]) for n, t in turns)
        left = node("Sub", f"{name}/left", [across, down])
        right = node("Add", f"{name}/right", [back, along])
        return node("Concat", name, [left, right], attributes={"axis": -1})

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

    def _product(self, name: str, tensor: str, x: str) -> str:
        rows, columns = self.shapes[".".join(tensor.split(".")[-3:-1])]
        return self.matrices.product(name, x, self.weights.matrix(tensor, rows, columns))
