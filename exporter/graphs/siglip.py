"""The two halves of SigLIP as ONNX graphs of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.siglip import SiglipImage, SiglipText
from exporter.graphs.embedding import table_rows
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.matrices import take_rows
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def write_siglip_image(
    folder: Path, name: str, spec: SiglipImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> image_embeds float32
    [images, hidden_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    tower, side = spec.tower, spec.tower.image_size
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", FLOAT, ["images", 3, side, side])
        embeds = writer.output("image_embeds", FLOAT, ["images", tower.hidden_size])
        at = f"{tower.prefix}embeddings.position_embedding.weight"
        table = weights.array(at, (spec.rows, tower.hidden_size))
        rows = [vit.patches(pixels, bias=True), float_weight(writer, "positions", table)]
        stream = Stream(writer.node("Add", "embedded", rows))
        for layer in range(tower.layers):
            stream = vit.block(layer, stream)
        states, _ = vit.norm(f"{tower.prefix}post_layernorm", stream, last=True)
        _pooled(vit, spec, states, embeds)
        return writer.finish()


def write_siglip_text(
    folder: Path, name: str, spec: SiglipText, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids int64 [texts, length], padded as the model was trained -> text_embeds float32
    [texts, output_size], not normalised, logit_scale float32 [], already exponentiated, and
    logit_bias float32 []. Raises `InputRefused` when tensors are missing or of other shapes.
    """
    block = spec.block
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, block, weights, accuracy_level)
        ids = writer.input("input_ids", INT64, ["texts", "length"])
        embeds = writer.output("text_embeds", FLOAT, ["texts", spec.output_size])
        stream = Stream(_placed_tokens(vit, spec, ids))
        for layer in range(block.layers):
            stream = vit.block(layer, stream)
        normed, _ = vit.norm(f"{block.prefix}final_layer_norm", _last(writer, stream), last=True)
        product = vit.product("head", spec.head, normed, (spec.output_size, block.hidden_size))
        writer.node("Add", "head/bias", [*product], outputs=[embeds])
        log_scale = writer.constant("log_scale", weights.vector(spec.logit_scale, 1))
        _scalar(writer, "logit_scale", writer.node("Exp", "scale", [log_scale]))
        _scalar(writer, "logit_bias", writer.constant("bias", weights.vector(spec.logit_bias, 1)))
        return writer.finish()


def _pooled(vit: Vit, spec: SiglipImage, states: str, embeds: str) -> None:
    """What the learned query finds in the states, and an MLP added to it, as the output `embeds`."""
    writer, weights, at = vit.writer, vit.weights, spec.head
    hidden, inner = spec.tower.hidden_size, spec.tower.intermediate_size
    whole = weights.matrix(f"{at}attention.in_proj_weight", 3 * hidden, hidden)
    probe = float_weight(writer, "probe", weights.array(f"{at}probe", (1, 1, hidden)))
    query = vit.multiply("head.query", probe, take_rows(whole, slice(0, hidden)))
    packed = vit.multiply("head.key_value", states, take_rows(whole, slice(hidden, 3 * hidden)))
    keys_values = ["head.key", "head.value"]
    split = {"axis": -1, "num_outputs": 2}
    writer.node("Split", "head.split", [packed], outputs=keys_values, attributes=split)
    bias = writer.weight("head.bias", weights.vector(f"{at}attention.in_proj_bias", 3 * hidden))
    # The query's product is the same for all images.
    count = writer.node("Shape", "image_count", [states], attributes={"start": 0, "end": 1})
    ones = writer.constant("query.shape", np.array([1, 1], np.int64))
    shape = writer.node("Concat", "queries.shape", [count, ones], attributes={"axis": 0})
    queries = writer.node("Expand", "queries", [query, shape])
    seen = vit.attend("head", [queries, *keys_values], bias)
    found = writer.node(
        "Add", "head.found", [*vit.product("head.out_proj", f"{at}attention.out_proj", seen)]
    )
    summary = vit.reshape("head.summary", found, [-1, hidden])
    normed, _ = vit.norm(f"{at}layernorm", Stream(summary))
    wide = vit.product("head.fc1", f"{at}mlp.fc1", normed, (inner, hidden))
    active = vit.activate("head.gelu", spec.tower.activation, *wide)
    narrow = vit.product("head.fc2", f"{at}mlp.fc2", active, (hidden, inner))
    added = writer.node("Add", "head.mlp", [*narrow])
    writer.node("Add", "head.sum", [summary, added], outputs=[embeds])


def _placed_tokens(vit: Vit, spec: SiglipText, ids: str) -> str:
    """Token embeddings with the positions of their places."""
    writer, hidden = vit.writer, spec.block.hidden_size
    table = vit.weights.matrix(spec.embedding, spec.vocab_size, hidden)
    tokens = table_rows(writer, spec.embedding, table, ids, "tokens")
    stored = vit.weights.array(spec.positions, (spec.max_positions, hidden))
    positions = float_weight(writer, "positions", stored)
    zero, one = (writer.constant(f"places.{n}", np.array([n], np.int64)) for n in (0, 1))
    length = writer.node("Shape", "length", [ids], attributes={"start": 1, "end": 2})
    rows = writer.node("Slice", "placed_rows", [positions, zero, length, zero, one])
    return writer.node("Add", "placed", [tokens, rows])


def _last(writer: GraphWriter, x: Stream) -> Stream:
    """The stream at each text's last place, which may be padding: rows ``[texts, hidden]``."""
    place = writer.constant("last_place", np.array(-1, np.int64))
    rows = [
        writer.node("Gather", f"last_{what}", [value, place], attributes={"axis": 1})
        for what, value in (("residual", x.residual), ("addition", x.addition))
    ]
    return Stream(rows[0], rows[1], x.bias)


def _scalar(writer: GraphWriter, name: str, value: str) -> None:
    """`value` ``[1]`` as the output `name` ``[]``."""
    shape = writer.constant(f"{name}.shape", np.empty(0, np.int64))
    out = writer.output(name, FLOAT, [])
    writer.node("Reshape", f"{name}/scalar", [value, shape], outputs=[out])
