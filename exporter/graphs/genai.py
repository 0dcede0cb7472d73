"""What onnxruntime-genai 0.18 needs beside the layout: its config, and one graph without weights.

genai's multimodal model types want an embedding graph with an ``image_features`` input, which
transformers.js would not feed. Its type ``decoder-pipeline`` runs any chain of graphs instead:
vision encoder, embedding, a graph that puts the features where the image tokens are, decoder.
The first and the third run for the prompt only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from exporter.core.artifact import write_atomic
from exporter.core.digest import canonical_json
from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.writer import OPSET

MERGE = "merge_image_features"
IR_VERSION = 10


def write_genai_files(
    model: Path, decoder: TextDecoder, image_token: int, stops: Sequence[int]
) -> None:
    """Write ``genai_config.json`` and ``merge_image_features.onnx`` into the folder `model`."""
    graph = merge_graph(image_token, decoder.hidden_size)
    write_atomic(model / f"{MERGE}.onnx", graph)
    settings = genai_config(decoder, stops)
    write_atomic(model / "genai_config.json", canonical_json(settings))


def merge_graph(image_token: int, hidden: int) -> bytes:
    """An ONNX graph: row k of image_features at the place of the k-th image token.

    input_ids int64 [batch, sequence], inputs_embeds float32 [batch, sequence, hidden],
    image_features float32 [tiles, tokens, hidden] -> merged_embeds, shaped as inputs_embeds.
    """
    shape = ["batch_size", "sequence_length", hidden]
    nodes = [
        helper.make_node("Equal", ["input_ids", "image_token"], ["is_image"]),
        helper.make_node("NonZero", ["is_image"], ["found"]),
        helper.make_node("Transpose", ["found"], ["places"], perm=[1, 0]),
        helper.make_node("Reshape", ["image_features", "rows"], ["features"]),
        helper.make_node("ScatterND", ["inputs_embeds", "places", "features"], ["merged_embeds"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape[:2]),
        helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(
            "image_features", TensorProto.FLOAT, ["tiles", "tokens", hidden]
        ),
    ]
    output = helper.make_tensor_value_info("merged_embeds", TensorProto.FLOAT, shape)
    constants = [
        numpy_helper.from_array(np.array(image_token, np.int64), "image_token"),
        numpy_helper.from_array(np.array([-1, hidden], np.int64), "rows"),
    ]
    graph = helper.make_graph(nodes, MERGE, inputs, [output], constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def genai_config(decoder: TextDecoder, stops: Sequence[int]) -> dict[str, Any]:
    """The genai_config.json that chains the layout's graphs; greedy, caches shared in place."""
    inputs, outputs = _names(decoder)
    settings = {
        "session_options": {"provider_options": []},
        "hidden_size": decoder.hidden_size,
        "head_size": decoder.head_dim,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "num_hidden_layers": decoder.layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "pipeline": [_pipeline(inputs, outputs)],
    }
    return {
        "model": {
            "type": "decoder-pipeline",
            "vocab_size": decoder.vocab_size,
            "context_length": decoder.max_positions,
            "eos_token_id": list(stops),
            "pad_token_id": stops[0],
            "decoder": settings,
        },
        "search": {
            "do_sample": False,
            "max_length": decoder.max_positions,
            "past_present_share_buffer": True,
        },
    }


def _names(decoder: TextDecoder) -> tuple[list[str], list[str]]:
    layers = [f"{i}.{part}" for i in range(decoder.layers) for part in ("key", "value")]
    past = [f"past_key_values.{name}" for name in layers]
    inputs = ["inputs_embeds", "attention_mask", "num_logits_to_keep", *past]
    return inputs, ["logits", *(f"present.{name}" for name in layers)]


def _pipeline(inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    # genai runs the stages in this order; canonical JSON sorts keys, hence the numbers.
    return {
        "1-vision": {
            "filename": "onnx/vision_encoder.onnx",
            "inputs": ["pixel_values"],
            "outputs": ["image_features"],
            "run_on_token_gen": False,
        },
        "2-embedding": {
            "filename": "onnx/embed_tokens.onnx",
            "inputs": ["input_ids"],
            "outputs": ["inputs_embeds"],
        },
        "3-merge": {
            "filename": f"{MERGE}.onnx",
            "inputs": ["input_ids", "inputs_embeds", "image_features"],
            "outputs": ["merged_embeds"],
            "output_names_forwarder": {"merged_embeds": "inputs_embeds"},
            "run_on_token_gen": False,
        },
        "4-decoder": {
            "filename": "onnx/decoder_model_merged.onnx",
            "inputs": inputs,
            "outputs": outputs,
        },
    }
