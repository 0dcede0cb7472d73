"""Inputs of all three graphs as a model's own images and prompt make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.cases import EXAMPLE_MODALITY, prompt_for
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed, PromptInputs
from exporter.families.table import family_of
from exporter.graphs import decoder, embedding, tower
from exporter.graphs.standard.profiles import read_shapes
from exporter.runtimes.greedy import image_places
from exporter.runtimes.ort_session import open_session

Array = NDArray[np.float32]


def drawn_images() -> tuple[Image.Image, ...]:
    """Three gray pictures without meaning: noise, a bright square on black, a ramp."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400), np.uint8)
    square = np.zeros((256, 256), np.uint8)
    square[64:192, 64:192] = 255
    ramp = np.linspace(0, 255, 512).astype(np.uint8)[None].repeat(200, axis=0)
    return tuple(Image.fromarray(p).convert("RGB") for p in (noise, square, ramp))


def example_feeds(model: Path, images: Sequence[Image.Image], prompt: str) -> dict[str, list[Feed]]:
    """Inputs of each graph of an exported folder `model`, for each of `images` behind `prompt`.

    The decoder sees the whole prompt with an empty past and keeps all logits. Without a tokenizer the
    inputs are the specs' random ones. Raises `InputRefused` when a graph does not load.
    """
    config = read_config(model / "config.json")
    family = family_of(config)
    if not (model / "tokenizer.json").is_file():
        rng = np.random.default_rng(0)
        text, vision = family.decoder_spec(config), family.tower_spec(config)
        ids = np.arange(min(8, text.vocab_size), dtype=np.int64)[None]
        return {
            tower.NAME: list(vision.example_feeds(rng)),
            embedding.NAME: [{"input_ids": ids}],
            decoder.NAME: list(text.example_feeds(rng)),
        }
    preparer = family.open_preparer(model)
    paths = {n: model / "onnx" / f"{n}.onnx" for n in (tower.NAME, embedding.NAME, decoder.NAME)}
    asked = prompt_for(prompt, EXAMPLE_MODALITY)
    prepared = [preparer.prepare([image], asked) for image in images]
    feeds: dict[str, list[Feed]] = {
        tower.NAME: [feed for inputs in prepared for feed in inputs.vision],
        embedding.NAME: [{"input_ids": inputs.input_ids[None]} for inputs in prepared],
    }
    seen = [_outputs(paths[tower.NAME], inputs.vision) for inputs in prepared]
    embeds = [rows["inputs_embeds"][0] for rows in _each(paths[embedding.NAME], feeds)]
    shapes, _ = read_shapes(paths[decoder.NAME])
    for inputs, rows, features in zip(prepared, embeds, seen, strict=True):
        if "image_features" in features:
            whole = features["image_features"]
            rows[image_places(preparer, inputs, len(whole))] = whole
    feeds[decoder.NAME] = [
        _text(inputs, rows, features, shapes)
        for inputs, rows, features in zip(prepared, embeds, seen, strict=True)
    ]
    return feeds


def _each(path: Path, feeds: dict[str, list[Feed]]) -> list[dict[str, Array]]:
    return [_outputs(path, [feed]) for feed in feeds[path.stem]]


def _outputs(path: Path, feeds: Sequence[Feed]) -> dict[str, Array]:
    """What a graph gives for all of `feeds`: features as rows ``[rows, width]``, one behind the other."""
    session = open_session(path, 1)
    names = [o.name for o in session.get_outputs()]
    runs = [dict(zip(names, session.run(names, dict(feed)), strict=True)) for feed in feeds]
    if names == ["image_features"]:
        rows = [np.asarray(r[names[0]]) for r in runs]
        return {names[0]: np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows])}
    return {name: np.concatenate([np.asarray(r[name]) for r in runs]) for name in names}


def _text(
    inputs: PromptInputs,
    embeds: Array,
    features: dict[str, Array],
    shapes: dict[str, list[int | str]],
) -> Feed:
    """Inputs of the decoder graph for one prompt."""
    length = len(embeds)
    feed: dict[str, NDArray[np.generic]] = {
        "inputs_embeds": embeds[None],
        "attention_mask": np.ones((1, length), np.int64),
        "num_logits_to_keep": np.array(0, np.int64),
        "prefix_length": np.array(inputs.prefix_length, np.int64),
        **features,
    }
    if inputs.positions is not None:
        feed["position_ids"] = inputs.positions[:, None]
    if inputs.image_mask is not None:
        feed["image_attention_mask"] = inputs.image_mask[None]
    for name, shape in shapes.items():
        if name.startswith("past_key_values."):
            feed[name] = np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32)
    return {name: feed[name] for name in shapes}
