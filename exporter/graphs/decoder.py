"""The Llama decoder as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.graphs.linear import linear
from exporter.graphs.weights import Matrix, WeightSource, stack_rows
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

NAME = "decoder_model_merged"
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DecoderOptions:
    """`accuracy_level` of packed matrices; whether gate and up share one matrix product."""

    accuracy_level: int = 4
    fuse_mlp: bool = True


def rotary_tables(
    positions: int, head_dim: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines ``[positions, head_dim / 2]``, float32 (RoFormer, arXiv 2104.09864).

    Rounded where LlamaRotaryEmbedding rounds: frequencies and angles are float32, or positions far
    out would turn by other angles than the model was trained with.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


def write_decoder(
    folder: Path, spec: DecoderSpec, weights: WeightSource, options: DecoderOptions
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs: inputs_embeds float32 [batch, sequence, hidden]; attention_mask int64 [batch, total],
    ones then zeros (padding on the right); num_logits_to_keep int64 scalar (0 keeps all);
    past_key_values.{i}.key|value float32 [batch, kv_heads, past, head_dim]. Outputs: logits and
    present.{i}.key|value. Past and present may be one buffer of any length.
    Raises `InputRefused` when tensors are missing or of other shapes, or the attention op cannot
    do the head size.
    """
    if spec.head_dim % 16:
        raise InputRefused(
            f"config.json: head_dim is {spec.head_dim}; onnxruntime's GroupQueryAttention with "
            "rotary positions needs a multiple of 16, this model cannot be exported for it"
        )
    with GraphWriter(folder, NAME) as writer:
        _Decoder(writer, spec, weights, options).build()
        return writer.finish()


class _Decoder:
    def __init__(
        self, writer: GraphWriter, spec: DecoderSpec, weights: WeightSource, options: DecoderOptions
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights
        self.options = options
        self.shapes = spec.matrix_shapes()

    def build(self) -> None:
        writer, spec = self.writer, self.spec
        batch = "batch_size"
        x = writer.input("inputs_embeds", FLOAT, [batch, "sequence_length", spec.hidden_size])
        writer.input("attention_mask", INT64, [batch, "total_sequence_length"])
        writer.input("num_logits_to_keep", INT64, [])
        logits = writer.output("logits", FLOAT, [batch, "kept_length", spec.vocab_size])
        self._lengths()
        self._rotary()
        starts = self._kept_from()
        residual, addition = x, ""
        for layer in range(spec.layers):
            at = f"{spec.prefix}layers.{layer}."
            gamma = f"{at}input_layernorm.weight"
            normed, residual = self._add_norm(
                f"layers.{layer}.input_norm", residual, addition, gamma
            )
            attended = self._attention(layer, normed)
            if layer == spec.layers - 1:
                # Behind the last attention no position needs another: drop those nobody asked for.
                attended = self._keep("keep_attended", attended, starts)
                residual = self._keep("keep_residual", residual, starts)
            projected = self._linear(
                f"layers.{layer}.o_proj", attended, self._matrix(f"{at}self_attn.o_proj.weight")
            )
            gamma = f"{at}post_attention_layernorm.weight"
            normed, residual = self._add_norm(
                f"layers.{layer}.post_norm", residual, projected, gamma
            )
            addition = self._mlp(layer, normed)
        normed, _ = self._add_norm("final_norm", residual, addition, spec.final_norm)
        linear(writer, "head", normed, self._head(), self.options.accuracy_level, output=logits)

    def _lengths(self) -> None:
        # seqlens_k: index of each row's last valid key; total: length of the mask, past included.
        writer = self.writer
        axis = writer.constant("one", np.array([1], np.int64))
        count = writer.node(
            "ReduceSum", "valid", ["attention_mask", axis], attributes={"keepdims": 0}
        )
        last = writer.node("Sub", "last_valid", [count, axis])
        self.seqlens = writer.node("Cast", "seqlens_k", [last], attributes={"to": INT32})
        shape = writer.node(
            "Shape", "mask_length", ["attention_mask"], attributes={"start": 1, "end": 2}
        )
        scalar = writer.node("Squeeze", "mask_scalar", [shape])
        self.total = writer.node("Cast", "total_length", [scalar], attributes={"to": INT32})

    def _rotary(self) -> None:
        spec = self.spec
        cos, sin = rotary_tables(spec.max_positions, spec.head_dim, spec.rope_theta)
        self.cos = self.writer.weight("rotary.cos", cos)
        self.sin = self.writer.weight("rotary.sin", sin)

    def _kept_from(self) -> str:
        # Slicing from -n keeps n positions; from -0 = 0 it keeps all.
        kept = self.writer.node("Neg", "keep_from", ["num_logits_to_keep"])
        return self.writer.node("Reshape", "keep_starts", [kept, self._one()])

    def _one(self) -> str:
        return self.writer.constant("one", np.array([1], np.int64))

    def _keep(self, name: str, x: str, starts: str) -> str:
        ends = self.writer.constant("last", np.array([LAST], np.int64))
        return self.writer.node("Slice", name, [x, starts, ends, self._one()])

    def _add_norm(self, name: str, residual: str, addition: str, gamma: str) -> tuple[str, str]:
        """RMS norm of residual + addition, and that sum; without an addition, of the residual."""
        scale = self.writer.weight(
            f"{name}.weight", self.weights.vector(gamma, self.spec.hidden_size)
        )
        epsilon = {"epsilon": self.spec.norm_eps}
        if not addition:
            # onnxruntime registers this contrib op in the standard domain.
            normed = self.writer.node(
                "SimplifiedLayerNormalization",
                name,
                [residual, scale],
                attributes={**epsilon, "axis": -1},
            )
            return normed, residual
        outputs = [f"{name}:0", "", "", f"{name}:sum"]
        if gamma == self.spec.final_norm:
            outputs = outputs[:1]
        self.writer.node(
            "SkipSimplifiedLayerNormalization",
            name,
            [residual, addition, scale],
            domain=MICROSOFT,
            outputs=outputs,
            attributes=epsilon,
        )
        return outputs[0], outputs[-1]

    def _attention(self, layer: int, x: str) -> str:
        writer, spec = self.writer, self.spec
        name = f"layers.{layer}.attention"
        shape: list[int | str] = [
            "batch_size",
            spec.kv_heads,
            "past_sequence_length",
            spec.head_dim,
        ]
        past = [
            writer.input(f"past_key_values.{layer}.{part}", FLOAT, shape)
            for part in ("key", "value")
        ]
        shape[2] = "present_sequence_length"
        present = [
            writer.output(f"present.{layer}.{part}", FLOAT, shape) for part in ("key", "value")
        ]
        writer.node(
            "GroupQueryAttention",
            name,
            [*self._queries(layer, x), *past, self.seqlens, self.total, self.cos, self.sin],
            domain=MICROSOFT,
            outputs=[f"{name}:0", *present],
            attributes={
                "num_heads": spec.heads,
                "kv_num_heads": spec.kv_heads,
                "scale": float(np.float32(spec.head_dim**-0.5)),
                "do_rotary": 1,
                "rotary_interleaved": 0,
            },
        )
        return f"{name}:0"

    def _queries(self, layer: int, x: str) -> list[str]:
        """Query, key and value inputs of the attention op: one packed value where formats agree."""
        at = f"{self.spec.prefix}layers.{layer}.self_attn."
        names = [f"{at}{part}_proj.weight" for part in "qkv"]
        if len({self.weights.format(n) for n in names}) == 1:
            stacked = stack_rows([self._matrix(n) for n in names])
            return [self._linear(f"layers.{layer}.qkv_proj", x, stacked), "", ""]
        return [
            self._linear(f"layers.{layer}.{part}_proj", x, self._matrix(n))
            for part, n in zip("qkv", names, strict=True)
        ]

    def _mlp(self, layer: int, x: str) -> str:
        writer = self.writer
        name = f"layers.{layer}"
        at = f"{self.spec.prefix}{name}.mlp."
        names = [f"{at}{part}_proj.weight" for part in ("gate", "up")]
        if self.options.fuse_mlp and len({self.weights.format(n) for n in names}) == 1:
            both = self._linear(f"{name}.gate_up", x, stack_rows([self._matrix(n) for n in names]))
            gate, up = f"{name}.split:gate", f"{name}.split:up"
            writer.node(
                "Split",
                f"{name}.split",
                [both],
                outputs=[gate, up],
                attributes={"axis": -1, "num_outputs": 2},
            )
        else:
            gate, up = (
                self._linear(f"{name}.{part}", x, self._matrix(n))
                for part, n in zip(("gate", "up"), names, strict=True)
            )
        # QuickGelu with alpha 1 is x * sigmoid(x), in one pass.
        silu = writer.node(
            "QuickGelu", f"{name}.silu", [gate], domain=MICROSOFT, attributes={"alpha": 1.0}
        )
        product = writer.node("Mul", f"{name}.gated", [silu, up])
        return self._linear(f"{name}.down", product, self._matrix(f"{at}down_proj.weight"))

    def _head(self) -> Matrix:
        """The head's own matrix where the folder has one, else the embedding of a tied model."""
        spec = self.spec
        if spec.tied and not self.weights.has(spec.head):
            return self.weights.matrix(
                spec.embedding, spec.vocab_size, spec.hidden_size, again=True
            )
        return self.weights.matrix(spec.head, spec.vocab_size, spec.hidden_size)

    def _matrix(self, name: str) -> Matrix:
        rows, columns = self.shapes[".".join(name.split(".")[-3:-1])]
        return self.weights.matrix(name, rows, columns)

    def _linear(self, name: str, x: str, matrix: Matrix) -> str:
        return linear(self.writer, name, x, matrix, self.options.accuracy_level)
