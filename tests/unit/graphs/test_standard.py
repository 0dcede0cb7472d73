"""The standard dialect against torch and against the ort dialect, in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.graphs.check import check_graphs
from exporter.graphs.export import export_model
from exporter.graphs.standard.lowering import Standard
from exporter.graphs.writer import MICROSOFT, GraphWriter
from exporter.runtimes.ort import OrtCaptioner
from tests.support.tiny import write_tiny_model
from tests.support.tiny_llava import TILE, write_tiny_llava

from .conftest import Decoder, make_model, relative, save, session, text_logits
from .test_decoder import tokens
from .test_tower import features, tiles

Out = Callable[[str], Path]
SHAPES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}, True),
    ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}, False),
]


def standard(source: Path, out: Path, storage: Any = "float32") -> Path:
    """The model folder of an export in the standard dialect."""
    export_model(source, out, dialect="standard", float_storage=storage)
    return out / "model"


@pytest.mark.parametrize(("text", "tied"), SHAPES)
def test_logits_equal_torch(text: dict[str, Any], tied: bool, tmp_path: Path, out: Out) -> None:
    model = make_model(text, {}, tied=tied)
    decoder = Decoder(standard(save(model, tmp_path / "m"), out("e")))
    for seed, shape in enumerate(((1, 1), (1, 13), (3, 7), (1, 90))):
        ids = tokens(seed, *shape)
        reference = text_logits(model, ids)
        assert reference.std() > 0.1
        assert relative(decoder.run(ids)[0], reference) < 1e-5
        last, _ = decoder.run(ids, keep=2)
        assert relative(last, reference[:, -2:]) < 1e-5


def test_prefill_then_decode_equals_one_pass(tmp_path: Path, out: Out) -> None:
    model = make_model(*SHAPES[1][:1], {}, tied=True)
    decoder = Decoder(standard(save(model, tmp_path / "m"), out("e")))
    ids = tokens(5, 1, 20)
    reference = text_logits(model, ids)
    logits, past = decoder.run(ids[:, :9])
    rows = [logits]
    for start, stop in ((9, 10), (10, 14), (14, 15), (15, 20)):
        logits, past = decoder.run(ids[:, start:stop], past=past)
        rows.append(logits)
    assert past[0].shape[2] == 20
    assert relative(np.concatenate(rows, 1), reference) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_two_with_padding_where_the_mask_says(side: str, tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    decoder = Decoder(standard(save(model, tmp_path / "m"), out("e")))
    long, short = tokens(7, 1, 12), tokens(8, 1, 7)
    at = slice(5, 12) if side == "left" else slice(0, 7)
    ids, mask = np.zeros((2, 12), np.int64), np.ones((2, 12), np.int64)
    ids[0], ids[1, at], mask[1] = long[0], short[0], 0
    mask[1, at] = 1
    logits, past = decoder.run(ids, mask)
    assert np.isfinite(logits).all()
    assert relative(logits[:1], text_logits(model, long)) < 1e-5
    assert relative(logits[1:, at], text_logits(model, short)) < 1e-5
    # New places stand behind all others; the padding stays where it is.
    following = tokens(9, 2, 2)
    logits, _ = decoder.run(following, np.concatenate((mask, np.ones((2, 2), np.int64)), 1), past)
    for row, start in enumerate((long, short)):
        reference = text_logits(model, np.concatenate((start, following[row : row + 1]), 1))
        assert relative(logits[row : row + 1], reference[:, -2:]) < 1e-5


def test_float16_weights_give_what_the_ort_dialect_gives(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    source = save(model, tmp_path / "m")
    export_model(source, out("o"))
    folders = [tmp_path / "o" / "model", standard(source, out("e"), "float16")]
    ids, pixels = tokens(3, 2, 9), tiles(model, 1, 1, 2)
    (ort, ours), (seen, also) = (
        [Decoder(f).run(ids)[0] for f in folders],
        [session(f, "vision_encoder").run(None, {"pixel_values": pixels})[0] for f in folders],
    )
    assert relative(ours, ort) < 1e-5
    assert relative(also, seen) < 1e-5
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.copy_(parameter.half())
    assert relative(ours, text_logits(model, ids)) < 1e-5


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"hidden_size": 40, "num_attention_heads": 5, "image_size": 48},
        {"hidden_act": "gelu", "num_hidden_layers": 1},
    ],
)
def test_siglip_features_equal_torch(vision: dict[str, Any], tmp_path: Path, out: Out) -> None:
    model = make_model({}, vision)
    run = session(standard(save(model, tmp_path / "m"), out("e")), "vision_encoder").run
    for seed, (batch, count) in enumerate(((1, 1), (1, 3), (2, 2))):
        pixels = tiles(model, seed, batch, count)
        reference = features(model, pixels)
        assert relative(run(None, {"pixel_values": pixels})[0], reference) < 1e-5


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip_features_equal_the_ort_dialects(hidden_act: str, tmp_path: Path, out: Out) -> None:
    # The ort dialect's are held against torch in test_clip_tower.
    base = write_tiny_llava(tmp_path / "base", vision={"hidden_act": hidden_act})
    merge_adapters(base, [], out("m"))
    export_model(tmp_path / "m", out("o"), float_storage="float32")
    folder = standard(tmp_path / "m", out("e"))
    pixels = np.random.default_rng(0).uniform(-2, 2, (1, 3, 3, TILE, TILE)).astype(np.float32)
    wanted, got = (
        session(f, "vision_encoder").run(None, {"pixel_values": pixels})[0]
        for f in (tmp_path / "o" / "model", folder)
    )
    assert wanted.std() > 0.05
    assert relative(got, wanted) < 1e-5


@pytest.mark.parametrize(
    "write",
    [
        write_tiny_model,
        write_tiny_llava,
        lambda folder: write_tiny_llava(folder, kind="llava_next", decoder="mistral"),
    ],
    ids=["idefics3", "llava", "llava_next"],
)
def test_captions_are_those_of_the_ort_dialect(
    write: Callable[[Path], Path], tmp_path: Path, out: Out
) -> None:
    merge_adapters(write(tmp_path / "base"), [], out("m"))
    export_model(tmp_path / "m", out("o"))
    folder = standard(tmp_path / "m", out("e"), "float16")
    wanted, got = (OrtCaptioner(f, threads=1) for f in (tmp_path / "o" / "model", folder))
    rng, seen = np.random.default_rng(0), set()
    for height in (40, 100):
        image = Image.fromarray(rng.integers(0, 255, (height, 90, 3), dtype=np.uint8))
        caption = wanted.caption(image, "Describe this medical image.", 16)
        assert got.caption(image, "Describe this medical image.", 16).tokens == caption.tokens
        seen.update(caption.tokens)
    assert len(seen) > 3
    forced = [c.score(image, "Describe", [5, 6, 7]) for c in (got, wanted)]
    assert relative(*forced) < 1e-4


def test_graphs_hold_standard_operators_alone(tmp_path: Path, out: Out) -> None:
    merge_adapters(write_tiny_model(tmp_path / "base"), [], out("m"))
    folder = standard(tmp_path / "m", out("e"), "float16")
    for path in sorted((folder / "onnx").iterdir()):
        model = onnx.load(path)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
        assert {n.domain for n in model.graph.node} == {""}
        onnx.checker.check_model(model, full_check=True)
    assert [g.name for g in check_graphs(folder)] == [
        "vision_encoder",
        "embed_tokens",
        "decoder_model_merged",
    ]
    # onnxruntime-genai shares buffers in place, which these graphs do not.
    assert not (folder / "genai_config.json").exists()
    written = json.loads((tmp_path / "e" / "export.json").read_text())
    assert (written["dialect"], written["accuracy_level"]) == ("standard", 0)
    found = written["standard"]
    assert found["operators"]["decoder_model_merged"]["Softmax"] == 2
    assert "TensorRT itself was not run" in found["checked"]


def test_two_exports_are_the_same_bytes(tmp_path: Path, out: Out) -> None:
    source = save(make_model({}, {}), tmp_path / "m")
    first, second = (standard(source, out(n), "float16") for n in "ab")
    for path in sorted((first / "onnx").iterdir()):
        assert path.read_bytes() == (second / "onnx" / path.name).read_bytes()


def test_operators_that_it_cannot_say_are_refused_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InputRefused, match="own MatMulBnb4, .* --dialect ort") as error,
        GraphWriter(tmp_path, "g", dialect=Standard) as writer,
    ):
        writer.node("MatMulBnb4", "a", ["x"], domain=MICROSOFT)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
