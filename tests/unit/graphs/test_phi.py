"""Moondream's graphs and torch model against the published description in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.modelfiles import read_config
from exporter.families.base import PromptInputs
from exporter.families.captioners import moondream
from exporter.families.images.overlap_crops import crop_image
from exporter.graphs.export import export_model
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchEngine, load_model
from tests.support import plain_moondream as plain
from tests.support.tiny_moondream import write_tiny_moondream

torch.set_num_threads(1)
SIZES = ((64, 64), (90, 33), (13, 40))


@dataclass
class Tiny:
    """One tiny model: its weights, its torch model and its exported graphs."""

    weights: dict[str, plain.Array]
    model: Any
    captioner: OrtCaptioner


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("moondream")
    merged, out = root / "merged", root / "out"
    merged.mkdir()
    out.mkdir()
    merge_adapters(write_tiny_moondream(root / "base"), [], merged)
    export_model(merged, out, float_storage="float32")
    model = load_model(merged, read_config(merged / "config.json"))
    return Tiny(plain.read_weights(merged), model, OrtCaptioner(out / "model", threads=1))


def picture(size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(sum(size))
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def expected(
    tiny: Tiny, size: tuple[int, int], inputs: PromptInputs
) -> tuple[plain.Array, plain.Array]:
    """Features and logits in plain numpy."""
    pixels, tiling = crop_image(picture(size), tiny.captioner.preparer.vision.crops)  # type: ignore[attr-defined]
    rows = plain.features(tiny.weights, pixels, tiling)
    return rows, plain.logits(tiny.weights, inputs.input_ids, rows)


@pytest.mark.parametrize("size", SIZES)
def test_features_and_logits_equal_plain_numpy(tiny: Tiny, size: tuple[int, int]) -> None:
    inputs = tiny.captioner.preparer.prepare([picture(size)], "Describe this medical image.")
    rows, logits = expected(tiny, size, inputs)
    with torch.inference_mode():
        ours = moondream.torch_features(tiny.model, inputs).numpy()
    engine, reference = (
        tiny.captioner.engine,
        TorchEngine(tiny.model, tiny.captioner.preparer, moondream),
    )  # type: ignore[arg-type]
    assert relative(ours, rows) < 1e-5
    assert relative(np.asarray(engine.features(inputs)), rows) < 1e-5
    last = logits[-1:]
    assert relative(engine.forced(inputs, engine.features(inputs), []), last) < 1e-5
    assert relative(reference.forced(inputs, torch.from_numpy(ours), []), last) < 1e-5


def test_one_decoder_layer_equals_plain_numpy(tiny: Tiny) -> None:
    random = np.random.default_rng(0)
    x, seen = random.standard_normal((9, 64)), np.tril(np.ones((9, 9), bool))
    seen[:5, :5] = True
    found = plain.text_block(tiny.weights, "model.text.blocks.1.", x, seen)
    phi = tiny.model._computing[0]
    states = torch.from_numpy(x).float()[None]
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~torch.from_numpy(seen), torch.finfo().min)
    with torch.inference_mode():
        turns = phi.rotary_emb(states, torch.arange(9)[None])
        layer = phi.layers[1](states, attention_mask=mask, position_embeddings=turns)
    assert relative(layer[0].numpy(), found) < 1e-5


def test_a_decoder_that_only_looks_back_gives_other_logits(tiny: Tiny) -> None:
    """The trap of an attention op that is always causal: it fails without an error."""
    inputs = tiny.captioner.preparer.prepare([picture(SIZES[0])], "Describe this medical image.")
    engine = tiny.captioner.engine
    features = engine.features(inputs)
    right = engine.forced(inputs, features, [5, 6]).copy()
    wrong = engine.forced(replace(inputs, prefix_length=0), features, [5, 6])
    assert relative(wrong, right) > 0.01


def test_the_cache_continues_behind_the_prefix(tiny: Tiny) -> None:
    inputs = tiny.captioner.preparer.prepare([picture(SIZES[1])], "Describe this medical image.")
    engine = tiny.captioner.engine
    features = engine.features(inputs)
    whole = engine.forced(inputs, features, [7, 8, 9]).copy()
    steps = [engine.prefill(inputs, features, len(inputs.input_ids) + 3).copy()]
    steps += [engine.step(token).copy() for token in (7, 8, 9)]
    assert relative(np.stack(steps), whole) < 1e-5


def test_a_prefix_needs_a_decoder_that_takes_one(tiny: Tiny) -> None:
    decoder = tiny.captioner.engine.decoder
    decoder.prefixed = False
    try:
        with pytest.raises(ValueError, match="only looks back"):
            decoder.start(8, 1, prefix_length=3)
    finally:
        decoder.prefixed = True


def test_the_folder_has_no_second_copy_of_the_weights(tiny: Tiny) -> None:
    """The borrowed blocks of transformers hold nothing: each parameter is there once."""
    names = {name for name, _ in tiny.model.named_parameters()}
    assert names == set(tiny.weights)
    assert all(p.device.type == "cpu" for p in tiny.model.parameters())
