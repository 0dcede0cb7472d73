"""The vision graph against torch, float and packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.graphs.export import export_model

from .conftest import Model, make_model, relative, save, session

Out = Callable[[str], Path]


def features(model: Model, pixels: np.ndarray) -> np.ndarray:
    """Rows of all tiles in order, ``[tiles, tokens, hidden]``."""
    with torch.no_grad():
        rows = model.model.get_image_features(torch.from_numpy(pixels)).pooler_output
    size = model.config.text_config.hidden_size
    return torch.cat(list(rows)).reshape(pixels.shape[0] * pixels.shape[1], -1, size).numpy()


def tiles(model: Model, seed: int, batch: int, count: int) -> np.ndarray:
    side = model.config.vision_config.image_size
    values = np.random.default_rng(seed).uniform(-1, 1, (batch, count, 3, side, side))
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("vision", "scale"),
    [
        ({}, 2),
        ({"image_size": 64, "patch_size": 16, "num_attention_heads": 4}, 4),
        # 27 patches a side and pixels left over, as in SmolVLM-2.2B.
        ({"image_size": 55, "patch_size": 2, "num_hidden_layers": 1}, 3),
        # A grid whose position rows rounding changes.
        ({"image_size": 50, "patch_size": 2, "num_hidden_layers": 1}, 5),
        ({"hidden_act": "gelu", "image_size": 48}, 3),
    ],
)
def test_features_equal_torch(vision: dict[str, Any], scale: int, tmp_path: Path, out: Out) -> None:
    model = make_model({}, vision, scale=scale)
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    run = session(tmp_path / "e" / "model", "vision_encoder").run
    for seed, (batch, count) in enumerate(((1, 1), (1, 3), (2, 2))):
        pixels = tiles(model, seed, batch, count)
        reference = features(model, pixels)
        assert reference.std() > 0.1
        got = run(None, {"pixel_values": pixels})[0]
        assert got.dtype == np.float32
        assert relative(got, reference) < 1e-4


def test_a_tile_of_zeros_gets_features_too(tmp_path: Path, out: Out) -> None:
    # torch drops such a tile as padding; the graph keeps one row block per tile, so that the
    # caller's count of image tokens still fits.
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float32")
    pixels = tiles(model, 0, 1, 2)
    pixels[0, 0] = 0
    got = session(tmp_path / "e" / "model", "vision_encoder").run(None, {"pixel_values": pixels})[0]
    with torch.no_grad():
        hidden = model.model.vision_model(torch.from_numpy(pixels[0])).last_hidden_state
        reference = model.model.connector(hidden).numpy()
    assert relative(got, reference) < 1e-4


def test_float16_storage_computes_in_float32_on_rounded_weights(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    export_model(save(model, tmp_path / "m"), out("e"), float_storage="float16")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    pixels = tiles(model, 4, 1, 2)
    got = session(tmp_path / "e" / "model", "vision_encoder").run(None, {"pixel_values": pixels})[0]
    assert relative(got, features(model, pixels)) < 1e-5
