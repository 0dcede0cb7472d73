"""The token embedding: rows of a float table, or of the same packed bytes a tied head uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix
from exporter.core.errors import InputRefused
from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import float_weight
from exporter.graphs.matrices import Matrix
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph

NAME = "embed_tokens"


def write_embedding(
    folder: Path, spec: TextDecoder, weights: WeightSource, dialect: OpenDialect | None = None
) -> WrittenGraph:
    """Write ``embed_tokens.onnx``: input_ids int64 [batch, sequence] -> inputs_embeds float32.

    Raises `InputRefused` when the table is missing or of another shape.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        ids = writer.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        shape: list[int | str] = ["batch_size", "sequence_length", spec.hidden_size]
        out = writer.output("inputs_embeds", TensorProto.FLOAT, shape)
        table = weights.matrix(spec.embedding, spec.vocab_size, spec.hidden_size)
        table_rows(writer, spec.embedding, table, ids, out)
        return writer.finish()


def table_rows(writer: GraphWriter, name: str, table: Matrix, ids: str, out: str) -> str:
    """The float32 rows `ids` of the table that the checkpoint calls `name`, as the value `out`.

    Raises `InputRefused` for a form of which rows cannot be looked up.
    """
    if isinstance(table, PackedMatrix):
        if writer.dialect is not None:
            return writer.dialect.rows(table, ids, out)
        return _gather_packed(writer, table, ids, out)
    if not isinstance(table, np.ndarray):
        raise InputRefused(
            f"'{name}' is a {type(table).__name__}, of which rows cannot be looked up; keep the "
            "embedding in float16"
        )
    stored = writer.weight("embedding.weight", table)
    rows = writer.node("Gather", "gather", [stored, ids])
    # After the lookup: only the rows asked for become float32.
    kind = {"to": TensorProto.FLOAT}
    return writer.node("Cast", "cast", [rows], outputs=[out], attributes=kind)


def _gather_packed(writer: GraphWriter, table: PackedMatrix, ids: str, out: str) -> str:
    form = table.format
    padded = table.blocks * form.block != table.columns
    inputs = [
        writer.weight("embedding.qdata", table.qdata.reshape(table.rows, -1)),
        ids,
        float_weight(writer, "embedding.scales", table.scales),
    ]
    if table.zero_points is not None:
        inputs.append(writer.weight("embedding.zero_points", table.zero_points))
    rows = writer.node(
        "GatherBlockQuantized",
        "gather",
        inputs,
        domain=MICROSOFT,
        outputs=["gather:0" if padded else out],
        attributes={
            "bits": form.bits,
            "block_size": form.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
    )
    if padded:
        bounds = {"start": 0, "end": table.columns, "axis": -1}
        names = [writer.constant(k, np.array([v], np.int64)) for k, v in bounds.items()]
        writer.node("Slice", "unpad", [rows, *names], outputs=[out])
    return out
