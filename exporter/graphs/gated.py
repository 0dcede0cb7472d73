"""IDEFICS' decoder as an ONNX graph: Llama blocks, and gated blocks that see the images' keys and values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.idefics import GatedLlama
from exporter.graphs.attention import attention
from exporter.graphs.decoder import NAME, DecoderOptions, LlamaGraph, check_head_size
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.embedding import NAME as EMBEDDING
from exporter.graphs.embedding import table_rows
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def write_gated_llama(
    folder: Path,
    spec: GatedLlama,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx``, prefill and decode in one graph.

    Inputs and outputs as `graphs.decoder.write_decoder`, and cross_key_values.{i}.key|value float32
    [batch, heads, images * latents, head_dim]; image_attention_mask int64 [batch, sequence, images],
    1 where a position sees an image. What sees none takes nothing from the gated blocks' attention.
    Raises `InputRefused` as `write_decoder` does.
    """
    check_head_size(spec.llama, dialect)
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        llama = LlamaGraph(writer, spec.llama, weights, options)
        embeds, logits = llama.begin(spec.vocab_size)
        gated = _GatedBlocks(llama, spec)
        stream = (embeds, "")
        for layer in range(spec.layers):
            if layer % spec.interval == 0:
                stream = gated.block(layer // spec.interval, *stream)
            stream = llama.block(layer, *stream)
        _write_head(llama, spec, llama.final(*stream), logits)
        return writer.finish()


def write_parted_embedding(
    folder: Path, spec: GatedLlama, weights: WeightSource, dialect: OpenDialect | None = None
) -> WrittenGraph:
    """Write ``embed_tokens.onnx`` as `graphs.embedding.write_embedding`, of Llama's rows and the added ones.

    Raises `InputRefused` when a table is missing or of another shape.
    """
    with GraphWriter(folder, EMBEDDING, dialect=dialect) as writer:
        ids = writer.input("input_ids", INT64, ["batch_size", "sequence_length"])
        shape: list[int | str] = ["batch_size", "sequence_length", spec.hidden_size]
        out = writer.output("inputs_embeds", FLOAT, shape)
        size = (spec.llama.vocab_size, spec.hidden_size)
        table = weights.matrix(spec.embedding, *size)
        if not spec.added:
            table_rows(writer, spec.embedding, table, ids, out)
            return writer.finish()
        # Each table is asked for a row it has: the other one's tokens get its last or first.
        zero = writer.constant("zero", np.array(0, np.int64))
        last = writer.constant("last_row", np.array(size[0] - 1, np.int64))
        count = writer.constant("llama_rows", np.array(size[0], np.int64))
        known = writer.node("Min", "known_ids", [ids, last])
        rows = table_rows(writer, spec.embedding, table, known, "rows")
        behind = writer.node("Sub", "behind", [ids, count])
        own = writer.node("Max", "added_ids", [behind, zero])
        stored = weights.array(spec.added_embedding, (spec.added, spec.hidden_size))
        added = writer.node("Gather", "added", [float_weight(writer, "added.weight", stored), own])
        chosen = writer.node("GreaterOrEqual", "is_added", [ids, count])
        column = writer.node("Unsqueeze", "is_added_column", [chosen, _last_axis(writer)])
        writer.node("Where", "embeds", [column, added, rows], outputs=[out])
        return writer.finish()


def _last_axis(writer: GraphWriter) -> str:
    return writer.constant("last_axis", np.array([-1], np.int64))


def _write_head(llama: LlamaGraph, spec: GatedLlama, x: str, logits: str) -> None:
    """The logits of Llama's tokens and, behind them, those of the added ones."""
    writer, weights, level = llama.writer, llama.weights, llama.options.accuracy_level
    head = weights.matrix(spec.head, spec.llama.vocab_size, spec.hidden_size)
    if not spec.added:
        linear(writer, "head", x, head, level, output=logits)
        return
    known = linear(writer, "head", x, head, level)
    rows = weights.array(spec.added_head, (spec.added, spec.hidden_size))
    added = linear(writer, "added_head", x, rows, level)
    writer.node("Concat", "all_logits", [known, added], outputs=[logits], attributes={"axis": -1})


class _GatedBlocks:
    """Writes gated blocks between the blocks of a `LlamaGraph`."""

    def __init__(self, llama: LlamaGraph, spec: GatedLlama) -> None:
        self.llama, self.spec, self.writer, self.weights = llama, spec, llama.writer, llama.weights
        self._mask()

    def _mask(self) -> None:
        """What is added to the scores of each position, and 1 or 0 where it sees an image or none."""
        writer, name = self.writer, "image_attention_mask"
        given = writer.input(name, INT64, ["batch_size", "sequence_length", "images"])
        seen = writer.node("Cast", "images_seen", [given], attributes={"to": TensorProto.BOOL})
        axes = writer.constant("images_seen.axes", np.array([1, 4], np.int64))
        wide = writer.node("Unsqueeze", "images_seen.column", [seen, axes])
        shape = np.array([1, 1, 1, 1, self.spec.latents], np.int64)
        rows = writer.node("Expand", "rows_seen", [wide, writer.constant("rows_seen.shape", shape)])
        flat = writer.constant("rows_seen.flat", np.array([0, 0, 0, -1], np.int64))
        flags = writer.node("Reshape", "rows_seen.row", [rows, flat])
        values = {"seen": 0.0, "unseen": np.finfo(np.float32).min}
        names = [writer.constant(k, np.array(v, np.float32)) for k, v in values.items()]
        self.bias = writer.node("Where", "image_bias", [flags, *names])
        number = writer.node("Cast", "images_seen.number", [seen], attributes={"to": FLOAT})
        axis = _last_axis(writer)
        self.gate = writer.node("ReduceMax", "sees_any", [number, axis], attributes={"keepdims": 1})

    def block(self, block: int, residual: str, addition: str) -> tuple[str, str]:
        """Gated block `block`: cross-attention, then an MLP, each times its gate; see `LlamaGraph`."""
        llama, writer, name, at = self.llama, self.writer, f"gated.{block}", self.spec.gated(block)
        gamma = f"{at}input_layernorm.weight"
        normed, residual = llama.add_norm(f"{name}.input_norm", residual, addition, gamma)
        attended = self._attention(block, normed)
        projected = self._product(f"{name}.o_proj", f"{at}cross_attn.o_proj", attended)
        factor = writer.node("Mul", f"{name}.sees", [self.gate, self._alpha(block, "cross_attn")])
        opened = writer.node("Mul", f"{name}.opened", [projected, factor])
        gamma = f"{at}post_attention_layernorm.weight"
        normed, residual = llama.add_norm(f"{name}.post_norm", residual, opened, gamma)
        dense = llama.mlp(name, f"{at}mlp.", normed)
        return residual, writer.node("Mul", f"{name}.dense", [dense, self._alpha(block, "dense")])

    def _alpha(self, block: int, part: str) -> str:
        """The hyperbolic tangent of a gate, which is known here."""
        stored = self.weights.array(f"{self.spec.gated(block)}alpha_{part}", self.spec.alpha)
        return self.writer.weight(f"gated.{block}.alpha_{part}", np.tanh(stored.astype(np.float32)))

    def _attention(self, block: int, x: str) -> str:
        writer, spec, name = self.writer, self.spec, f"gated.{block}"
        at = f"{spec.gated(block)}cross_attn."
        queries = self._product(f"{name}.q_proj", f"{at}q_proj", x)
        if spec.qk_norms:
            scale = self.weights.vector(f"{at}q_layer_norm.weight", spec.head_dim)
            heads = self._reshape(f"{name}.heads", queries, [0, 0, spec.heads, spec.head_dim])
            normed = writer.node(
                "SimplifiedLayerNormalization",
                f"{name}.q_norm",
                [heads, writer.weight(f"{name}.q_norm.weight", scale)],
                attributes={"epsilon": spec.llama.norm_eps, "axis": -1},
            )
            queries = self._reshape(f"{name}.queries", normed, [0, 0, spec.hidden_size])
        shape: list[int | str] = ["batch_size", spec.heads, "image_rows", spec.head_dim]
        image = [
            writer.input(f"cross_key_values.{block}.{part}", FLOAT, shape)
            for part in ("key", "value")
        ]
        inputs = [queries, *image, "", "", self.bias]
        return attention(writer, f"{name}.attention", inputs, spec.heads, spec.head_dim)

    def _product(self, name: str, tensor: str, x: str) -> str:
        size = self.spec.hidden_size
        matrix = self.weights.matrix(f"{tensor}.weight", size, size)
        return linear(self.writer, name, x, matrix, self.llama.options.accuracy_level)

    def _reshape(self, name: str, x: str, shape: list[int]) -> str:
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])
