"""BLIP-2 (arXiv 2301.12597) and XrayGPT (arXiv 2306.07971): EVA-ViT-g, Q-Former, OPT or Llama.

An image becomes as many rows in the text as the Q-Former has queries. Absent keys of a config.json
take the defaults of transformers' config classes (Blip2Config and its parts, OPTConfig, LlamaConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import DecoderSpec, PromptInputs, ReaderFiles
from exporter.families.blip2_prompts import Blip2Preparer, read_blip2_preparer
from exporter.families.blip2_vision import Blip2Vision, blip2_vision
from exporter.families.config import choice, flag, image_token, section
from exporter.families.llama import DecoderNames, llama_spec
from exporter.families.opt import OptSpec, opt_spec
from exporter.families.published import modern_config
from exporter.families.xraygpt_published import CLASS, MODEL_TYPE, PUBLISHED_TYPE

if TYPE_CHECKING:
    import torch

MODEL_TYPES = (MODEL_TYPE, PUBLISHED_TYPE)
TORCH_CLASSES = {MODEL_TYPE: CLASS, PUBLISHED_TYPE: CLASS}
HEAD = "language_model.lm_head.weight"
LLAMA = DecoderNames(
    prefix="language_model.model.",
    embedding="language_model.model.embed_tokens.weight",
    final_norm="language_model.model.norm.weight",
    head=HEAD,
)
OPT = "language_model.model.decoder."
PROOF_IMAGES = 2


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec | OptSpec:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config, and for T5."""
    config = modern_config(config)
    text = section(config, "text_config")
    # Without a default: names of tensors follow from it.
    opt = choice(text, "model_type", "", ("opt", "llama"), "text_config") == "opt"
    tied = flag(config, "tie_word_embeddings", flag(text, "tie_word_embeddings", opt))
    if opt:
        return opt_spec(text, prefix=OPT, head=HEAD, tied=tied)
    return llama_spec(text, LLAMA, tied=tied)


def tower_spec(config: Mapping[str, Any]) -> Blip2Vision:
    """Tower, Q-Former and projection of a parsed config.json. Raises `InputRefused`."""
    return blip2_vision(modern_config(config), decoder_spec(config).hidden_size)


def open_preparer(model_dir: Path) -> Blip2Preparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = modern_config(read_config(model_dir / "config.json"))
    return read_blip2_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:
    """Blip2Processor's classes, and how many rows it counts for an image."""
    queries = {"num_query_tokens": tower_spec(config).tokens}
    return ReaderFiles("Blip2Processor", "BlipImageProcessor", queries, genai=True)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images before the fifth token of `ids`. Raises `InputRefused` without image token."""
    vision, token = tower_spec(config), image_token(config)
    if token is None:
        raise InputRefused("config.json: no image_token_index; expected the id of the image token")
    image = np.full(PROOF_IMAGES * vision.tokens, token)
    ids = np.concatenate([ids[:4], image, ids[4:]])
    side = vision.tower.image_size
    pixels = rng.uniform(-1, 1, (PROOF_IMAGES, 3, side, side)).astype(np.float32)
    return {"input_ids": ids[None], "pixel_values": pixels}, PROOF_IMAGES


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[rows, hidden]`` of tower, Q-Former and projection, image by image."""
    import torch

    found: list[torch.Tensor] = []
    for feed in inputs.vision:
        states = model.vision_model(torch.from_numpy(feed["pixel_values"][0])).last_hidden_state
        queries = model.query_tokens.expand(len(states), -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        found.append(model.language_projection(seen).flatten(0, 1))
    return torch.cat(found)


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same by transformers' own method, all images at once."""
    import torch

    rows: torch.Tensor = model.get_image_features(
        torch.from_numpy(inputs.pixel_values)
    ).pooler_output
    return rows.flatten(0, 1)


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`."""
    out = model.language_model.model(
        inputs_embeds=embeds[None], past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state[0], out.past_key_values
