"""A BERT that makes one vector of a text, as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.bert_towers import BertText
from exporter.graphs.bert import Bert
from exporter.graphs.linear import linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter, WrittenGraph


def write_bert_text(
    folder: Path, name: str, spec: BertText, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    input_ids and attention_mask int64 [texts, length] -> text_embeds float32 [texts, output_size],
    not normalised, and logit_scale float32 [], already exponentiated, where the spec has one.
    Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, name) as writer:
        bert = Bert(writer, spec.bert, weights, accuracy_level)
        states = bert.states(types=False)
        x = _average(writer, spec, states) if spec.averaged else bert.first_token(states[-1])
        out = writer.output("text_embeds", TensorProto.FLOAT, ["texts", spec.output_size])
        inputs = spec.bert.hidden_size
        for number, (tensor, outputs) in enumerate(spec.projections):
            if number:
                x = writer.node("Gelu", f"{tensor}/gelu", [x], domain=MICROSOFT)
            last = number == len(spec.projections) - 1
            matrix = weights.matrix(tensor, outputs, inputs)
            stem = tensor.removesuffix(".weight")
            x = linear(writer, stem, x, matrix, accuracy_level, output=out if last else None)
            inputs = outputs
        if spec.logit_scale:
            _write_scale(writer, spec, weights)
        return writer.finish()


def _average(writer: GraphWriter, spec: BertText, states: list[str]) -> str:
    """Mean over some hidden states and all places, ``[texts, hidden]``."""
    total = states[spec.averaged[0]]
    for number in spec.averaged[1:]:
        total = writer.node("Add", f"states_to_{number}", [total, states[number]])
    axis = writer.constant("places", np.array([1], np.int64))
    keep = {"keepdims": 0}
    summed = writer.node("ReduceMean", "mean_place", [total, axis], attributes=keep)
    count = writer.constant("states", np.array([len(spec.averaged)], np.float32))
    return writer.node("Div", "mean_state", [summed, count])


def _write_scale(writer: GraphWriter, spec: BertText, weights: WeightSource) -> None:
    """The temperature, within its limits, as the output ``logit_scale``."""
    value = weights.array(spec.logit_scale, ()).astype(np.float32)
    if spec.scale_limits is not None:
        least, greatest = spec.scale_limits
        value = np.clip(value, np.float32(least), np.float32(greatest))
    stored = writer.constant("log_scale", value.reshape(1))
    scalar = writer.constant("log_scale.shape", np.empty(0, np.int64))
    scale = writer.node("Exp", "scale", [stored])
    out = writer.output("logit_scale", TensorProto.FLOAT, [])
    writer.node("Reshape", "scale/scalar", [scale, scalar], outputs=[out])
