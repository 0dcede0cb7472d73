"""Packed matrices behind DequantizeLinear against torch with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.graphs.export import export_model
from exporter.graphs.standard.linear import signed_blocks
from exporter.quantizers.rtn import quantize_matrix
from exporter.runtimes.ort_session import open_session

from .conftest import Decoder, make_model, relative, save, text_logits
from .packing import pack, quantize_folder
from .test_quantized import TEXT, load, matrices
from .test_tower import features, tiles

Out = Callable[[str], Path]
# 80 and 112 columns leave a padded last block.
EVEN = {**TEXT, "vocab_size": 102}


def values(name: str, matrix: PackedMatrix) -> np.ndarray:
    """What the blocks of the standard dialect stand for, by the definition of DequantizeLinear."""
    blocks = signed_blocks(name, matrix)
    whole = blocks.codes.astype(np.float32) * np.repeat(blocks.scales, blocks.block, axis=1)
    return whole[:, : matrix.columns]


@pytest.mark.parametrize(
    "form", [BlockFormat(8, 32, True), BlockFormat(8, 128, True), BlockFormat(4, 64, True)]
)
def test_packed_graphs_equal_dequantized_torch(form: BlockFormat, tmp_path: Path, out: Out) -> None:
    model = make_model(EVEN, {}, tied=True)
    source = save(model, tmp_path / "m")
    formats = {n: form for n in matrices(model) if n != "lm_head.weight"}
    load(model, quantize_folder(source, tmp_path / "q", formats))
    report = export_model(tmp_path / "q", out("e"), dialect="standard")
    export_model(tmp_path / "q", out("o"), accuracy_level=0)
    ids, pixels = np.random.default_rng(1).integers(0, 100, (2, 11)), tiles(model, 1, 1, 2)
    logits = text_logits(model, ids)
    folder = tmp_path / "e" / "model"
    decoder = Decoder(folder)
    decoder.embed, decoder.decoder, vision = (
        open_session(folder / "onnx" / f"{n}.onnx", 1)
        for n in ("embed_tokens", "decoder_model_merged", "vision_encoder")
    )
    got, past = decoder.run(ids[:, :6])
    assert relative(got, logits[:, :6]) < 1e-5
    assert relative(decoder.run(ids[:, 6:], past=past)[0], logits[:, 6:]) < 1e-5
    assert relative(Decoder(tmp_path / "o" / "model").run(ids)[0], logits) < 1e-4
    seen = vision.run(None, {"pixel_values": pixels})[0]
    assert relative(seen, features(model, pixels)) < 1e-5
    assert report.standard is not None and not report.standard.widened
    graph = onnx.load(folder / "onnx" / "decoder_model_merged.onnx").graph
    kinds = {t.data_type for t in graph.initializer if t.name.endswith(".codes")}
    assert kinds == {TensorProto.INT4 if form.bits == 4 else TensorProto.INT8}


def test_an_embedding_gives_the_dequantized_rows(tmp_path: Path, out: Out) -> None:
    model = make_model(EVEN, {})
    name = "model.text_model.embed_tokens.weight"
    meaning = quantize_folder(
        save(model, tmp_path / "m"), tmp_path / "q", {name: BlockFormat(8, 32, True)}
    )
    export_model(tmp_path / "q", out("e"), dialect="standard")
    embed = open_session(tmp_path / "e" / "model" / "onnx" / "embed_tokens.onnx", 1)
    ids = np.array([[0, 5, 101], [3, 3, 99]])
    assert np.array_equal(embed.run(None, {"input_ids": ids})[0], meaning[name][ids])


@pytest.mark.parametrize("block", [64, 128, 256])
def test_blocks_with_scales_above_zero_stay_in_4_bits(block: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)
    weight[2] = 0
    matrix = quantize_matrix(weight, BlockFormat(4, block, True), search=False)
    blocks = signed_blocks("w", matrix)
    assert (blocks.bits, blocks.block, blocks.widened) == (4, min(block, 128), "")
    assert (blocks.scales > 0).all()
    assert np.array_equal(values("w", matrix), dequantize(matrix))


def test_negative_scales_are_turned_over_and_widen_where_they_must() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    matrix = quantize_matrix(weight, BlockFormat(4, 64, True), search=True)
    assert (matrix.scales < 0).any()
    blocks = signed_blocks("w", matrix)
    assert (blocks.scales > 0).all()
    assert blocks.bits == 8 and "negative" in blocks.widened
    assert np.array_equal(values("w", matrix), dequantize(matrix))
    # Without the least code there is nothing to widen.
    turned = PackedMatrix(
        BlockFormat(4, 64, True),
        64,
        np.full((2, 1, 32), 0xF1, np.uint8),
        np.array([[-0.5], [0.25]], np.float16),
        None,
    )
    assert signed_blocks("w", turned).bits == 4
    assert np.array_equal(values("w", turned), dequantize(turned))


@pytest.mark.parametrize(("rows", "block", "reason"), [(6, 32, "blocks of 32"), (7, 64, "7 rows")])
def test_what_tensorrt_has_no_4_bits_for_is_widened(rows: int, block: int, reason: str) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 128)).astype(np.float32)
    matrix = pack(weight, BlockFormat(4, block, True))
    blocks = signed_blocks("w", matrix)
    assert blocks.bits == 8 and reason in blocks.widened
    assert np.array_equal(values("w", matrix), dequantize(matrix))


def test_widened_matrices_are_named_in_export_json(tmp_path: Path, out: Out) -> None:
    model = make_model(EVEN, {})
    name = "model.text_model.layers.0.mlp.down_proj.weight"
    quantize_folder(save(model, tmp_path / "m"), tmp_path / "q", {name: BlockFormat(4, 32, True)})
    export_model(tmp_path / "q", out("e"), dialect="standard")
    written: dict[str, Any] = json.loads((tmp_path / "e" / "export.json").read_text())
    assert list(written["standard"]["widened"]) == ["layers.0.down"]


def test_asymmetric_blocks_are_refused(tmp_path: Path, out: Out) -> None:
    model = make_model(EVEN, {})
    name = "model.text_model.layers.0.mlp.down_proj.weight"
    quantize_folder(save(model, tmp_path / "m"), tmp_path / "q", {name: BlockFormat(4, 64, False)})
    with pytest.raises(InputRefused, match="asymmetric blocks.*--symmetric"):
        export_model(tmp_path / "q", out("e"), dialect="standard")


def test_8_bit_blocks_that_cannot_be_turned_over_are_refused() -> None:
    matrix = PackedMatrix(
        BlockFormat(8, 32, True),
        32,
        np.zeros((1, 1, 32), np.uint8),
        np.array([[-1.0]], np.float16),
        None,
    )
    with pytest.raises(InputRefused, match="code -128"):
        signed_blocks("w", matrix)
