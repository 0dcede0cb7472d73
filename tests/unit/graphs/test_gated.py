"""IDEFICS' graphs of settings that the published model does not have, against transformers' forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.graphs.export import export_model
from exporter.runtimes.greedy import Positions
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import load_model
from tests.support.tiny_idefics import write_tiny_idefics

torch.set_num_threads(1)
VARIANTS: dict[str, dict[str, Any]] = {
    "a gate per channel": {"alpha_type": "vector"},
    "no norms per head": {
        "qk_layer_norms": False,
        "perceiver": {"qk_layer_norms_perceiver": False},
    },
    "a gated block before every block": {"cross_layer_interval": 1, "dtype": "bfloat16"},
}


def exported(root: Path, **settings: Any) -> tuple[Path, OrtCaptioner]:
    """A merged model and the captioner of its float32 graphs."""
    merged, out = root / "merged", root / "exported"
    merged.mkdir()
    out.mkdir()
    merge_adapters(write_tiny_idefics(root / "base", **settings), [], merged)
    export_model(merged, out, float_storage="float32")
    return merged, OrtCaptioner(out / "model", threads=1)


def difference(merged: Path, captioner: OrtCaptioner) -> float:
    """Largest difference of the logits of all positions of a prompt with two images, relative."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (9, 7), np.uint8)) for _ in range(2)]
    inputs = captioner.preparer.prepare(images, "Describe this medical image.")
    assert inputs.image_mask is not None
    assert not inputs.image_mask[0].any()
    engine, length = captioner.engine, len(inputs.input_ids)
    run, embeds = engine._begin(inputs, engine.features(inputs), length, length)
    model = load_model(merged, json.loads((merged / "config.json").read_text()))
    with torch.inference_mode():
        expected = model(
            input_ids=torch.from_numpy(inputs.input_ids)[None],
            pixel_values=torch.from_numpy(inputs.pixel_values)[None],
            image_attention_mask=torch.from_numpy(inputs.image_mask)[None],
        ).logits[0]
    return float(np.abs(run.feed(embeds) - expected.numpy()).max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_all_positions_equal_forward(tmp_path: Path, variant: str) -> None:
    assert difference(*exported(tmp_path, **VARIANTS[variant])) < 1e-5


def test_a_model_without_added_tokens_has_one_table(tmp_path: Path) -> None:
    first = write_tiny_idefics(tmp_path / "first")
    config = json.loads((first / "config.json").read_text())
    tokens = config["vocab_size"] + config["additional_vocab_size"]
    (tmp_path / "second").mkdir()
    merged, captioner = exported(tmp_path / "second", vocab_size=tokens, additional_vocab_size=0)
    assert difference(merged, captioner) < 1e-5


def test_a_text_without_an_image_mask_is_refused(tmp_path: Path) -> None:
    _, captioner = exported(tmp_path)
    decoder = captioner.engine.decoder
    size = (1, decoder.heads, 6, decoder.head_dim)
    cross = {name: np.zeros(size, np.float32) for name in decoder.cross}
    run = decoder.start(4, 1, Positions(None), cross)
    with pytest.raises(ValueError, match="the prompt has none"):
        run.feed(np.zeros((1, 64), np.float32))


def test_a_head_size_that_the_attention_cannot_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="head_dim is 8; .* a multiple of 16"):
        exported(tmp_path, num_attention_heads=8)
