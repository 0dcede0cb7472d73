"""Moondream2: a SigLIP tower on overlapping crops, a two-layer projection, a Phi decoder.

transformers has no class for it. Published folders are read through `moondream_published`; the torch
model is put together from transformers' Phi and SigLIP blocks (`moondream_torch`), on parameters with
the published names. Start token and image see each other both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import Value
from exporter.core.modelfiles import read_config
from exporter.families.base import PromptInputs, ReaderFiles
from exporter.families.config import section
from exporter.families.layouts.moondream import (
    CLASS,
    MODEL_TYPE,
    OLDER_NAMES,
    PUBLISHED_TYPE,
    REVISION,
    check_code,
    moondream_config,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout, modern
from exporter.families.prompts.moondream import MoondreamPreparer, read_preparer
from exporter.families.shapes.moondream import moondream
from exporter.families.specs.moondream_vision import MoondreamVision, moondream_vision, random_feed
from exporter.families.specs.phi import PhiSpec, phi_spec

if TYPE_CHECKING:
    import torch

MODEL_TYPES = (PUBLISHED_TYPE, MODEL_TYPE)
TORCH_CLASSES = {MODEL_TYPE: f"exporter.families.reference.moondream:{CLASS}"}
PUBLISHED = {
    PUBLISHED_TYPE: PublishedLayout(
        moondream_config,
        NameMap(OLDER_NAMES),
        f"take that of the hub's revision {REVISION}",
        check=check_code,
        own_code=True,
    )
}
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        (
            *OLDER_NAMES,
            ("text", "model.text"),  # adapters of the published inner class
            ("vision", "model.vision"),
            ("region", "model.region"),
        ),
        embedding="model.text.wte",
        head="model.text.lm_head.weight",
    ),
)
SHAPES = {PUBLISHED_TYPE: moondream, MODEL_TYPE: moondream}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    # Of the published code: the published config.json holds none of these.
    "prefix_attention": 730,
    "text_config.model_type": "phi",
    "text_config.hidden_size": 2048,
    "text_config.intermediate_size": 8192,
    "text_config.num_hidden_layers": 24,
    "text_config.num_attention_heads": 32,
    "text_config.hidden_act": "gelu_new",
    "text_config.vocab_size": 51200,
    "text_config.max_position_embeddings": 2048,
    "text_config.layer_norm_eps": 1e-5,
    "text_config.rope_theta": 10000.0,
    "text_config.partial_rotary_factor": 0.5,
    "text_config.tie_word_embeddings": False,
    "vision_config.hidden_size": 1152,
    "vision_config.intermediate_size": 4304,
    "vision_config.num_hidden_layers": 27,
    "vision_config.num_attention_heads": 16,
    "vision_config.patch_size": 14,
    "vision_config.image_size": 378,
    "vision_config.layer_norm_eps": 1e-5,
    "vision_config.projection_inner_size": 8192,
    "vision_config.max_crops": 12,
    "vision_config.overlap_margin": 4,
}
TEXT, VISION, REGION = "model.text.", "model.vision.", "model.region."
PROOF_CROPS = (1, 2)


def decoder_spec(config: Mapping[str, Any]) -> PhiSpec:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    config = modern(config, PUBLISHED)
    rows = tower_spec(config).tokens
    return phi_spec(section(config, "text_config"), prefix=TEXT, prefix_length=1 + rows)


def tower_spec(config: Mapping[str, Any]) -> MoondreamVision:
    """Tower and projection of a parsed config.json. Raises `InputRefused` on a bad config."""
    return moondream_vision(modern(config, PUBLISHED), prefix=VISION, region=REGION)


def open_preparer(model_dir: Path) -> MoondreamPreparer:
    """Tokenizer and prompt of a model folder. Raises `InputRefused`."""
    config = modern(read_config(model_dir / "config.json", (PUBLISHED_TYPE,)), PUBLISHED)
    return read_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:  # noqa: ARG001 (the same for all)
    """Other readers have no class for it, and cannot feed the crops' places."""
    return ReaderFiles("MoondreamProcessor", "MoondreamImageProcessor", {}, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """An image of random crops behind the start token, before `ids`."""
    vision, text = tower_spec(config), section(config, "text_config")
    rows = np.full(vision.tokens, config["image_token_id"])
    ids = np.concatenate([[text["bos_token_id"]], rows, ids])
    feed = random_feed(vision, *PROOF_CROPS, rng)
    return {"input_ids": ids[None], **feed}, feed["pixel_values"].shape[1]


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[rows, hidden]`` of tower and projection, as the vision graph gives them."""
    import torch

    return torch.cat([model.image_features(**_tensors(model, feed)) for feed in inputs.vision])


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same with torch's own adaptive average over crops that are cut and joined."""
    import torch

    return torch.cat([model.stitched_features(**_tensors(model, feed)) for feed in inputs.vision])


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`. The text begins with the start token and its image."""
    out = model.decode(embeds[None], cache, model.prefix_length if cache is None else 0)
    return out.last_hidden_state[0], out.past_key_values


def _tensors(model: Any, feed: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """The feed where the model is, floats in its type: these methods are not its forward pass."""
    import torch

    weight = next(model.parameters())
    made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        for name, value in made.items()
    }
