"""The token embedding: rows of a float table, or of blocks behind DequantizeLinear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix
from exporter.core.errors import InputRefused
from exporter.families.decoder import TextDecoder
from exporter.graphs.embedding import NAME
from exporter.graphs.standard.linear import Weights
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_embedding(
    folder: Path, spec: TextDecoder, weights: WeightSource, widened: dict[str, str]
) -> WrittenGraph:
    """Write ``embed_tokens.onnx``: input_ids int64 [batch, sequence] -> inputs_embeds float32.

    Raises `InputRefused` when the table is missing, of another shape or in a form of onnxruntime's.
    """
    with GraphWriter(folder, NAME, contrib=False) as writer:
        ids = writer.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        shape: list[int | str] = ["batch_size", "sequence_length", spec.hidden_size]
        out = writer.output("inputs_embeds", TensorProto.FLOAT, shape)
        table = weights.matrix(spec.embedding, spec.vocab_size, spec.hidden_size)
        if isinstance(table, PackedMatrix):
            matrices = Weights(writer)
            # Before the lookup: TensorRT's Gather takes no 8-bit rows.
            values = matrices.dequantized("embedding", table, turned=False)
            writer.node("Gather", "gather", [values, ids], outputs=[out])
            widened.update(matrices.widened)
        elif isinstance(table, np.ndarray):
            stored = writer.weight("embedding.weight", table)
            rows = writer.node("Gather", "gather", [stored, ids])
            # After the lookup: only the rows asked for become float32.
            writer.node("Cast", "cast", [rows], outputs=[out], attributes={"to": TensorProto.FLOAT})
        else:
            raise InputRefused(
                f"'{spec.embedding}' is a {type(table).__name__}, of which rows cannot be looked up; "
                "keep the embedding in float16"
            )
        return writer.finish()
