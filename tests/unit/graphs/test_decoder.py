"""The decoder graph against torch: prefill, decoding, shared buffers, batches, float16 storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporter.graphs.export import export_model

from .conftest import Decoder, make_model, relative, save, session, text_logits

Out = Callable[[str], Path]
SHAPES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48}, True),
    ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}, False),
    (
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_theta": 1e5,
        },
        True,
    ),
]


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape)


@pytest.mark.parametrize(("text", "tied"), SHAPES)
def test_logits_equal_torch(text: dict[str, Any], tied: bool, tmp_path: Path, out: Out) -> None:
    model = make_model(text, {}, tied=tied)
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    decoder = Decoder(tmp_path / "e" / "model")
    for seed, shape in enumerate(((1, 1), (1, 13), (3, 7), (1, 90))):
        ids = tokens(seed, *shape)
        reference = text_logits(model, ids)
        assert reference.std() > 0.1
        assert relative(decoder.run(ids)[0], reference) < 1e-4
        last, _ = decoder.run(ids, keep=1)
        assert relative(last, reference[:, -1:]) < 1e-4


@pytest.mark.parametrize(("text", "tied"), SHAPES[:2])
def test_prefill_then_decode_equals_torch(
    text: dict[str, Any], tied: bool, tmp_path: Path, out: Out
) -> None:
    model = make_model(text, {}, tied=tied)
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    decoder = Decoder(tmp_path / "e" / "model")
    ids = tokens(5, 1, 20)
    reference = text_logits(model, ids)
    logits, past = decoder.run(ids[:, :9])
    rows = [logits]
    for at in range(9, 20):
        logits, past = decoder.run(ids[:, at : at + 1], past=past)
        rows.append(logits)
    assert past[0].shape[2] == 20
    assert relative(np.concatenate(rows, 1), reference) < 1e-4


def test_past_and_present_in_one_buffer(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    decoder = Decoder(tmp_path / "e" / "model")
    ids = tokens(6, 1, 30)
    reference = text_logits(model, ids)
    # Garbage beyond the valid part must not matter.
    buffers = [
        ort.OrtValue.ortvalue_from_numpy(np.full((1, 2, 64, 16), 1e4, np.float32))
        for _ in decoder.past_names
    ]
    rows = []
    for start, stop in ((0, 11), *((n, n + 1) for n in range(11, 30))):
        binding = decoder.decoder.io_binding()
        embeds = decoder.embed.run(None, {"input_ids": ids[:, start:stop]})[0]
        binding.bind_cpu_input("inputs_embeds", embeds)
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        binding.bind_cpu_input("num_logits_to_keep", np.array(0, np.int64))
        for name, buffer in zip(decoder.past_names, buffers, strict=True):
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        decoder.decoder.run_with_iobinding(binding)
        rows.append(binding.get_outputs()[-1].numpy())
    assert relative(np.concatenate(rows, 1), reference) < 1e-4


def test_batch_of_two_padded_on_the_right(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    decoder = Decoder(tmp_path / "e" / "model")
    long, short = tokens(7, 1, 12), tokens(8, 1, 7)
    ids = np.zeros((2, 12), np.int64)
    ids[0], ids[1, :7] = long[0], short[0]
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    logits, past = decoder.run(ids, mask)
    assert relative(logits[:1], text_logits(model, long)) < 1e-4
    assert relative(logits[1:, :7], text_logits(model, short)) < 1e-4
    # The next token of each row goes behind its own last one: the padding moves on.
    following = tokens(9, 2, 1)
    mask = np.ones((2, 13), np.int64)
    mask[1, 8:] = 0
    logits, _ = decoder.run(following, mask, past)
    for row, start in enumerate((long, short)):
        reference = text_logits(model, np.concatenate((start, following[row : row + 1]), 1))
        assert relative(logits[row : row + 1], reference[:, -1:]) < 1e-4


def test_greedy_tokens_equal_generate(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    decoder = Decoder(tmp_path / "e" / "model")
    seen: set[int] = set()
    for seed in range(10, 14):
        ids = tokens(seed, 1, 10)
        wanted = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(1, 10, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
        )[0, 10:].tolist()
        got: list[int] = []
        logits, past = decoder.run(ids, keep=1)
        while len(got) < 24:
            # min_new_tokens keeps generate from the stop token, id 2.
            logits[..., 2] = -np.inf
            got.append(int(logits[0, -1].argmax()))
            logits, past = decoder.run(np.array([[got[-1]]]), past=past, keep=1)
        assert got == wanted
        seen.update(got)
    assert len(seen) > 10


def test_float16_storage_computes_in_float32_on_rounded_weights(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float16")
    exact = text_logits(model, tokens(1, 2, 15))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    rounded = text_logits(model, tokens(1, 2, 15))
    got, _ = Decoder(tmp_path / "e" / "model").run(tokens(1, 2, 15))
    assert relative(got, rounded) < 1e-5
    assert relative(got, exact) > 1e-5


def test_onnxruntime_folds_the_casts_of_float16_weights(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float16")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(
        tmp_path / "e" / "model" / "onnx" / "decoder_model_merged.onnx",
        options,
        providers=["CPUExecutionProvider"],
    )
    optimized = ort.InferenceSession(
        tmp_path / "optimized.onnx", providers=["CPUExecutionProvider"]
    )
    assert optimized.get_inputs()[0].name == "inputs_embeds"
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    floats = [
        n
        for n in nodes
        if n.op_type == "Cast"
        and any(a.name == "to" and a.i == onnx.TensorProto.FLOAT for a in n.attribute)
    ]
    assert floats == []
    assert session(tmp_path / "e" / "model", "decoder_model_merged").get_inputs()
