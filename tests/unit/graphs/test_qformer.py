"""BLIP-2's vision graph against torch, in both dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.graphs.export import export_model
from exporter.graphs.tower import NAME
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner, load_model
from tests.support.tiny_blip2 import QUERIES, SIDE, write_tiny_blip2

from .conftest import relative, session

torch.set_num_threads(1)


def merged(folder: Path, **settings: Any) -> Path:
    """A tiny model as `medexport merge` leaves it."""
    base, out = write_tiny_blip2(folder / "base", **settings), folder / "merged"
    out.mkdir()
    merge_adapters(base, [], out)
    return out


def pixels(batch: int, tiles: int) -> np.ndarray:
    shape = (batch, tiles, 3, SIDE, SIDE)
    return np.random.default_rng(10 * batch + tiles).uniform(-2, 2, shape).astype(np.float32)


def expected(folder: Path, given: np.ndarray) -> np.ndarray:
    """Feature rows by transformers' own method."""
    model = load_model(folder, json.loads((folder / "config.json").read_text()))
    with torch.no_grad():
        found: np.ndarray = model.get_image_features(
            torch.from_numpy(given).flatten(0, 1)
        ).pooler_output.numpy()
    return found


def exported(source: Path, **settings: Any) -> Path:
    """The graphs of a merged folder in float32."""
    out = source.parent / "out"
    out.mkdir()
    export_model(source, out, float_storage="float32", **settings)
    return out / "model"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qformer": {"cross_attention_frequency": 1}},
        {"qformer": {"cross_attention_frequency": 3, "hidden_size": 64, "num_attention_heads": 2}},
        {"qformer": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}},
        {"vision": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3, "patch_size": 5}},
    ],
)
def test_features_equal_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    source = merged(tmp_path, **settings)
    run = session(exported(source), NAME).run
    for batch, tiles in ((1, 1), (1, 3), (2, 2)):
        given = pixels(batch, tiles)
        reference = expected(source, given)
        assert reference.shape == (batch * tiles, QUERIES, 64)
        assert reference.std() > 0.05
        assert relative(run(None, {"pixel_values": given})[0], reference) < 1e-4


def test_the_rows_depend_on_the_image_and_on_the_query(tmp_path: Path) -> None:
    reference = expected(merged(tmp_path), pixels(1, 2))
    assert np.abs(reference[0] - reference[1]).max() > 0.1
    assert np.abs(reference[0, 0] - reference[0, 1]).max() > 0.1


@pytest.mark.parametrize("decoder", ["opt", "llama"])
def test_the_standard_dialect_equals_torch(decoder: str, tmp_path: Path) -> None:
    """The vision graph, and what both decoders make of its rows."""
    source = merged(tmp_path, decoder=decoder)
    model = exported(source, dialect="standard")
    run = session(model, NAME).run
    for batch, tiles in ((1, 1), (1, 3)):
        given = pixels(batch, tiles)
        assert relative(run(None, {"pixel_values": given})[0], expected(source, given)) < 1e-4
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    captioners = OrtCaptioner(model, threads=1), TorchCaptioner(source, threads=1)
    found, logits = (c.score(image, "Describe", [7, 8, 9, 10]) for c in captioners)
    assert relative(found, logits) < 1e-4


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = merged(tmp_path)
    path, name = source / "model.safetensors", "query_tokens"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:, 1:].copy()}, path, {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match=rf"'{name}' is F16 \[1, 4, 32\]"):
        export_model(source, tmp_path / "out")
