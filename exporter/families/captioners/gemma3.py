"""Gemma 3 and MedGemma (arXiv 2503.19786, 2507.05201): SigLIP tower, pooled rows, Gemma 3 decoder.

Absent keys of a config.json take the defaults of transformers' config classes (Gemma3Config,
Gemma3TextConfig, SiglipVisionConfig): published configs leave many of them out.
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
from exporter.families.config import image_token
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.gemma3 import IMAGE_TOKEN, Gemma3Preparer, read_gemma3_preparer
from exporter.families.shapes.gemma3 import gemma3
from exporter.families.specs.gemma3 import (
    TEXT_SIZES,
    VISION_SIZES,
    Gemma3Decoder,
    PooledSiglip,
    gemma3_decoder,
    pooled_siglip,
)

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("gemma3",)
TORCH_CLASSES = {"gemma3": "Gemma3ForConditionalGeneration"}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        (
            ("language_model.lm_head", "lm_head"),  # <= 4.51
            ("language_model.model", "model.language_model"),  # <= 4.51
            ("language_model", "model.language_model"),
            ("vision_tower", "model.vision_tower"),  # <= 4.51
            ("multi_modal_projector", "model.multi_modal_projector"),  # <= 4.51
            ("model.vision_tower.vision_model", "model.vision_tower"),  # <= 4.57
        ),
        EMBEDDING,
        HEAD,
    ),
)
PUBLISHED: Mapping[str, PublishedLayout] = {}
SHAPES = {"gemma3": gemma3}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "mm_tokens_per_image": 256,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "tie_word_embeddings": True,
    **{f"text_config.{key}": size for key, size in TEXT_SIZES.items()},
    "text_config.rms_norm_eps": 1e-6,
    "text_config.query_pre_attn_scalar": 256,
    "text_config.rope_theta": 1_000_000.0,
    "text_config.rope_local_base_freq": 10_000.0,
    **{f"vision_config.{key}": size for key, size in VISION_SIZES.items()},
    "vision_config.layer_norm_eps": 1e-6,
}
PROOF_IMAGES = 2


def decoder_spec(config: Mapping[str, Any]) -> Gemma3Decoder:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    return gemma3_decoder(
        config,
        prefix="model.language_model.",
        embedding=EMBEDDING,
        final_norm="model.language_model.norm.weight",
        head=HEAD,
    )


def tower_spec(config: Mapping[str, Any]) -> PooledSiglip:
    """Tower and projector of a parsed config.json. Raises `InputRefused` on a bad config."""
    return pooled_siglip(
        config, prefix="model.vision_tower.", projector="model.multi_modal_projector."
    )


def open_preparer(model_dir: Path) -> Gemma3Preparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    return read_gemma3_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:
    """Processor classes, and rows per image; a chain of graphs cannot feed the places seen."""
    tokens = {"image_seq_length": tower_spec(config).tokens}
    return ReaderFiles("Gemma3Processor", "Gemma3ImageProcessor", tokens, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Random images before the fifth and the sixth token of `ids`."""
    vision, token = tower_spec(config), image_token(config)
    rows = np.full(vision.tokens, IMAGE_TOKEN if token is None else token)
    ids = np.concatenate([ids[:4], rows, ids[4:5], rows, ids[5:]])
    shape = (PROOF_IMAGES, 3, vision.image_size, vision.image_size)
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    kinds = (ids == rows[0]).astype(np.int64)
    inputs = {"input_ids": ids[None], "token_type_ids": kinds[None], "pixel_values": pixels}
    return inputs, PROOF_IMAGES


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[rows, hidden]`` of tower and projector, one image at a time."""
    import torch

    inner, found = model.model, []
    for pixels in torch.from_numpy(inputs.pixel_values):
        states = inner.vision_tower(pixel_values=pixels[None]).last_hidden_state
        found.append(inner.multi_modal_projector(states)[0])
    return torch.cat(found)


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same by transformers' own method."""
    import torch

    found = model.get_image_features(torch.from_numpy(inputs.pixel_values)).pooler_output
    rows: torch.Tensor = found.reshape(-1, found.shape[-1])
    return rows


def torch_append(
    model: Any, embeds: torch.Tensor, cache: Any, positions: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`."""
    import torch

    kinds = None
    if cache is None and positions is not None:
        place, last = positions
        ahead = last > place
        # An image's last token sees no further than itself.
        kinds = (ahead | torch.isin(place, last[ahead])).long()[None]
    out = model.model(
        inputs_embeds=embeds[None], token_type_ids=kinds, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state[0], out.past_key_values
