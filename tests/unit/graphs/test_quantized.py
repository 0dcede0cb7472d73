"""Packed matrices in the graphs against torch with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.core.blocks import BlockFormat
from exporter.graphs.export import export_model

from .conftest import Decoder, Model, make_model, relative, save, session, text_logits
from .packing import quantize_folder
from .test_tower import features, tiles

Out = Callable[[str], Path]
TEXT = {
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}


def matrices(model: Model) -> list[str]:
    """Names of all matrices that a scheme may pack."""
    names = [n for n, p in model.state_dict().items() if p.dim() == 2]
    return [n for n in names if "position_embedding" not in n]


def load(model: Model, weights: dict[str, np.ndarray]) -> Model:
    state = {n: torch.from_numpy(w) for n, w in weights.items()}
    lost, strange = model.load_state_dict(state, strict=False)
    assert strange == []
    assert set(lost) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_graphs_equal_dequantized_torch(
    bits: int, block: int, symmetric: bool, tmp_path: Path, out: Out
) -> None:
    # 80 and 112 columns leave a padded last block for 32 and 64.
    model = make_model(TEXT, {}, tied=True)
    source = save(model, tmp_path / "m")
    # A tied head has no tensor of its own in the file.
    form = BlockFormat(bits, block, symmetric)
    formats = {n: form for n in matrices(model) if n != "lm_head.weight"}
    meaning = quantize_folder(source, tmp_path / "q", formats)
    load(model, meaning)
    ids = np.random.default_rng(1).integers(0, 100, (2, 11))
    pixels = tiles(model, 1, 1, 2)
    logits, images = text_logits(model, ids), features(model, pixels)
    # Level 4 rounds the activations of each block to 8 bits: about 1/127 of the block's largest.
    for level, tolerance in ((0, 2e-5), (4, 0.06)):
        export_model(
            tmp_path / "q", out(f"e{level}"), accuracy_level=level, tower_accuracy_level=level
        )
        folder = tmp_path / f"e{level}" / "model"
        got, _ = Decoder(folder).run(ids)
        assert relative(got, logits) < tolerance
        seen = session(folder, "vision_encoder").run(None, {"pixel_values": pixels})[0]
        assert relative(seen, images) < tolerance
        assert np.abs(got - logits).mean() / np.abs(logits).mean() < tolerance / 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_embedding_gives_the_dequantized_rows(
    bits: int, symmetric: bool, tmp_path: Path, out: Out
) -> None:
    model = make_model(TEXT, {})
    name = "model.text_model.embed_tokens.weight"
    form = BlockFormat(bits, 32, symmetric)
    meaning = quantize_folder(save(model, tmp_path / "m"), tmp_path / "q", {name: form})
    export_model(tmp_path / "q", out("e"))
    ids = np.array([[0, 100, 57], [3, 3, 99]])
    rows = session(tmp_path / "e" / "model", "embed_tokens").run(None, {"input_ids": ids})[0]
    np.testing.assert_allclose(rows, meaning[name][ids], rtol=1e-6, atol=1e-7)


def test_mixed_formats_in_one_attention_are_not_stacked(tmp_path: Path, out: Out) -> None:
    model = make_model(TEXT, {})
    at = "model.text_model.layers.0."
    formats = {
        f"{at}self_attn.q_proj.weight": BlockFormat(4, 16, True),
        f"{at}self_attn.v_proj.weight": BlockFormat(8, 16, True),
        f"{at}mlp.up_proj.weight": BlockFormat(8, 32, False),
    }
    meaning = quantize_folder(save(model, tmp_path / "m"), tmp_path / "q", formats)
    load(model, meaning)
    report = export_model(tmp_path / "q", out("e"), accuracy_level=0)
    assert report.bits[f"{at}self_attn.q_proj.weight"] == 4
    assert report.bits[f"{at}self_attn.k_proj.weight"] == 16
    path = tmp_path / "e" / "model" / "onnx" / "decoder_model_merged.onnx"
    counts = [n.op_type for n in onnx.load(path).graph.node].count("MatMulNBits")
    assert counts == 3
    ids = np.random.default_rng(2).integers(0, 100, (1, 9))
    decoder = Decoder(tmp_path / "e" / "model")
    reference = text_logits(model, ids)
    assert relative(decoder.run(ids)[0], reference) < 2e-5
    _, past = decoder.run(ids[:, :5])
    assert relative(decoder.run(ids[:, 5:6], past=past)[0], reference[:, 5:6]) < 2e-5


def test_onnxruntime_folds_the_casts_of_scales(tmp_path: Path, out: Out) -> None:
    model = make_model(TEXT, {})
    formats = {n: BlockFormat(4, 32, False) for n in matrices(model)}
    quantize_folder(save(model, tmp_path / "m"), tmp_path / "q", formats)
    export_model(tmp_path / "q", out("e"))
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = tmp_path / "e" / "model" / "onnx" / "vision_encoder.onnx"
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMulNBits" in kinds
    assert "Cast" not in kinds
