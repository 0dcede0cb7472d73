"""LLaVA's vision graph and its decoder's limits against torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.progress import silent
from exporter.families.base import TensorSpec
from exporter.families.captioners.llava import torch_features
from exporter.families.specs.clip_tower import UNUSED
from exporter.graphs.export import export_model
from exporter.graphs.weights import WeightSource
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner, load_model
from tests.support.tiny_llava import TILE, TOKENS, write_tiny_llava

from .conftest import relative, session

torch.set_num_threads(1)


def merged(folder: Path, **settings: Any) -> Path:
    """A tiny model as `medexport merge` leaves it."""
    base, out = write_tiny_llava(folder / "base", **settings), folder / "merged"
    out.mkdir()
    merge_adapters(base, [], out)
    return out


def exported(folder: Path, source: Path, **settings: Any) -> Path:
    out = folder / "exported"
    out.mkdir()
    export_model(source, out, **{"float_storage": "float32", **settings})
    return out / "model"


def loaded(folder: Path) -> Any:
    return load_model(folder, json.loads((folder / "config.json").read_text()))


def tiles(seed: int, batch: int, count: int) -> np.ndarray:
    shape = (batch, count, 3, TILE, TILE)
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": -3},
        {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"},
        {"vision": {"hidden_act": "gelu", "image_size": TILE, "patch_size": 5}},
        {
            "vision": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1},
            "vision_feature_layer": -1,
        },
    ],
)
def test_features_equal_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    source = merged(tmp_path, **settings)
    run = session(exported(tmp_path, source), "vision_encoder").run
    model = loaded(source)
    for seed, (batch, count) in enumerate(((1, 1), (1, 3), (2, 2))):
        pixels = tiles(seed, batch, count)
        with torch.no_grad():
            flat = torch.from_numpy(pixels).flatten(0, 1)
            reference = torch.stack(list(model.get_image_features(flat).pooler_output)).numpy()
        assert reference.std() > 0.05
        assert relative(run(None, {"pixel_values": pixels})[0], reference) < 1e-4


def test_rows_are_gathered_from_tiles_and_newline(tmp_path: Path) -> None:
    source = merged(tmp_path, kind="llava_next")
    run = session(exported(tmp_path, source), "vision_encoder").run
    model, random = loaded(source), np.random.default_rng(0)
    for count in (1, 5):
        feed = {
            "pixel_values": tiles(count, 1, count),
            "feature_index": random.permutation(count * TOKENS + 1)[: 3 * count],
        }
        with torch.no_grad():
            inputs = type("Inputs", (), {"vision": (feed,)})
            reference = torch_features(model, inputs).numpy()
        assert relative(run(None, feed)[0], reference) < 1e-4
    last = {"pixel_values": tiles(9, 1, 1), "feature_index": np.array([TOKENS])}
    newline = model.model.image_newline.detach().numpy()
    np.testing.assert_array_equal(run(None, last)[0][0], newline)


def test_unused_blocks_stay_out_of_the_graph(tmp_path: Path) -> None:
    source = merged(tmp_path)
    (tmp_path / "q").mkdir()
    quantize_model(source, tmp_path / "q", find_scheme("int8"), threads=1, progress=silent)
    for folder in (source, tmp_path / "q"):
        out = tmp_path / f"out-{folder.name}"
        out.mkdir()
        report = export_model(folder, out)
        assert set(report.unused.values()) == {UNUSED}
        blocks = {name for name in report.unused if ".encoder.layers.2." in name}
        norms = {
            "model.vision_tower.post_layernorm.weight",
            "model.vision_tower.post_layernorm.bias",
        }
        assert report.unused.keys() == blocks | norms
        assert len(blocks) == 16
    # The quantized folder keeps them, so that torch loads it whole.
    assert loaded(tmp_path / "q").config.model_type == "llava"


def test_only_declared_tensors_may_stay_out(tmp_path: Path) -> None:
    source = merged(tmp_path)
    weights = WeightSource(source, "float32")
    taken = TensorSpec("lm_head.weight", (), reason="why", used=False)
    needed = TensorSpec("model.language_model.norm.weight", (), reason="norm")
    with pytest.raises(InputRefused, match="have no place in the graphs"):
        weights.finish([taken, needed])


def test_saved_position_ids_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain-graphs").mkdir()
    plain = merged(tmp_path / "plain")
    export_model(plain, tmp_path / "plain-graphs")
    base = write_tiny_llava(tmp_path / "base")
    path = base / "model.safetensors"
    name = "vision_tower.vision_model.embeddings.position_ids"
    save_file({**load_file(path), name: np.arange(TOKENS + 1)[None]}, path, {"format": "pt"})
    source, graphs = tmp_path / "merged", tmp_path / "graphs"
    source.mkdir()
    graphs.mkdir()
    merge_adapters(base, [], source)
    export_model(source, graphs)
    loaded(source)
    for graph in (graphs / "model" / "onnx").iterdir():
        same = tmp_path / "plain-graphs" / "model" / "onnx" / graph.name
        assert graph.read_bytes() == same.read_bytes()


@pytest.mark.parametrize("scheme", ["int8", "int4-rtn"])
def test_packed_towers_equal_the_dequantized_torch_model(scheme: str, tmp_path: Path) -> None:
    source, out = merged(tmp_path, kind="llava_next", decoder="mistral"), tmp_path / "q"
    out.mkdir()
    quantize_model(source, out, find_scheme(scheme), threads=1, progress=silent)
    found = OrtCaptioner(exported(tmp_path, out, accuracy_level=0), threads=1)
    reference = TorchCaptioner(out, threads=1)
    picture = picture_of(50, 90)
    caption = reference.caption(picture, "Describe", 12)
    assert found.caption(picture, "Describe", 12).tokens == caption.tokens
    expected = reference.score(picture, "Describe", caption.tokens)
    assert relative(found.score(picture, "Describe", caption.tokens), expected) < 1e-4


def test_the_context_ends_with_the_sliding_window(tmp_path: Path) -> None:
    """A window of 48: the same tokens as torch's windowed attention, up to the last that it covers."""
    source = merged(tmp_path, decoder="mistral", text={"sliding_window": 48})
    captioner = OrtCaptioner(exported(tmp_path, source), threads=1)
    inputs = captioner.preparer.prepare([picture_of(40, 40)], "Describe")
    length = len(inputs.input_ids)
    caption = captioner.caption(picture_of(40, 40), "Describe", 100)
    assert len(caption.tokens) == 48 - length or caption.stopped
    model = loaded(source)
    assert model.config.text_config.sliding_window == 48
    expected = model.generate(
        input_ids=torch.from_numpy(inputs.input_ids)[None],
        pixel_values=torch.from_numpy(inputs.pixel_values),
        max_new_tokens=len(caption.tokens),
        do_sample=False,
    )
    assert expected[0, length:].tolist() == list(caption.tokens)
    with pytest.raises(InputRefused, match="the model has 48"):
        captioner.preparer.prepare([picture_of(40, 40)], "Describe" * 20)


def picture_of(width: int, height: int) -> Any:
    from PIL import Image

    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)
