"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-Med: CLIP tower, two-layer projector, Llama or Mistral decoder.

LLaVA-NeXT runs the tower on the whole image and on tiles of it, and packs the tiles' rows line by
line behind a learned newline. Absent keys of a config.json take the defaults of transformers' config
classes (LlavaConfig, LlavaNextConfig, CLIPVisionConfig, LlamaConfig, MistralConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.modelfiles import read_config
from exporter.families.anyres import config_grid, feature_index
from exporter.families.base import DecoderSpec, Feed, PromptInputs, ReaderFiles
from exporter.families.config import choice, flag, image_token, section
from exporter.families.llama import DecoderNames, llama_spec, mistral_spec
from exporter.families.llava_prompts import IMAGE, IMAGE_TOKEN, LlavaPreparer, read_llava_preparer
from exporter.families.llava_vision import LlavaVision, llava_vision
from exporter.families.published import modern_config

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("llava", "llava_next", "llava_mistral")
TORCH_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_mistral": "LlavaForConditionalGeneration",
}
NEXT = "llava_next"
DECODER = DecoderNames(
    prefix="model.language_model.",
    embedding="model.language_model.embed_tokens.weight",
    final_norm="model.language_model.norm.weight",
    head="lm_head.weight",
)
DECODERS = {"llama": llama_spec, "mistral": mistral_spec}
PROOF_IMAGES = 2


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    config = modern_config(config)
    text = section(config, "text_config")
    kind = choice(text, "model_type", "llama", tuple(DECODERS), "text_config")
    tied = flag(config, "tie_word_embeddings", flag(text, "tie_word_embeddings", False))
    return DECODERS[kind](text, DECODER, tied=tied)


def tower_spec(config: Mapping[str, Any]) -> LlavaVision:
    """Tower, projector and newline of a parsed config.json. Raises `InputRefused` on a bad config."""
    config = modern_config(config)
    return llava_vision(config, newline=config["model_type"] == NEXT)


def open_preparer(model_dir: Path) -> LlavaPreparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = modern_config(read_config(model_dir / "config.json"))
    return read_llava_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:
    """Processor classes of the model_type, and how they count rows."""
    vision = tower_spec(config)
    processor = {
        "patch_size": vision.tower.patch_size,
        "vision_feature_select_strategy": "full" if vision.class_token else "default",
        "num_additional_image_tokens": 1,
        "image_token": IMAGE,
    }
    if vision.newline:
        # A chain of graphs has nowhere to take the row numbers from.
        return ReaderFiles("LlavaNextProcessor", "LlavaNextImageProcessor", processor, genai=False)
    return ReaderFiles("LlavaProcessor", "CLIPImageProcessor", processor, genai=True)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images (LLaVA-NeXT: one, twice as wide as high) before the fifth token of `ids`."""
    vision = tower_spec(config)
    side = vision.tower.image_size
    tiles, rows = PROOF_IMAGES, PROOF_IMAGES * vision.tokens
    more: dict[str, NDArray[Any]] = {}
    if vision.newline:
        size = (side, 2 * side)
        tiles, index = feature_index(size, config_grid(config, side), side, vision.tower.patches)
        rows, more = len(index), {"image_sizes": np.array([size], np.int64)}
    token = image_token(config)
    image = np.full(rows, IMAGE_TOKEN if token is None else token)
    ids = np.concatenate([ids[:4], image, ids[4:]])
    pixels = rng.uniform(-1, 1, (tiles, 3, side, side)).astype(np.float32)
    # LlavaNext has an axis for the images before that of their tiles.
    pixels = pixels[None] if vision.newline else pixels
    return {"input_ids": ids[None], "pixel_values": pixels, **more}, tiles


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[rows, hidden]`` of tower and projector, packed by `feature_index`."""
    import torch

    return torch.cat([_packed(model, feed) for feed in inputs.vision])


def _packed(model: Any, feed: Feed) -> torch.Tensor:
    import torch

    inner, config = model.model, model.config
    pixels = torch.from_numpy(feed["pixel_values"][0])
    states = inner.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    chosen = states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]
    rows: torch.Tensor = inner.multi_modal_projector(chosen)
    rows = rows.reshape(-1, rows.shape[-1])
    if "feature_index" not in feed:
        return rows
    table = torch.cat([rows, inner.image_newline[None].to(rows.dtype)])
    return table[torch.from_numpy(feed["feature_index"])]


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same by transformers' own method."""
    import torch

    found: list[torch.Tensor] = []
    for feed, size in zip(inputs.vision, inputs.sizes, strict=True):
        pixels = torch.from_numpy(feed["pixel_values"])
        if "feature_index" in feed:
            out = model.get_image_features(pixels, image_sizes=torch.tensor([size]))
        else:
            out = model.get_image_features(pixels[0])
        found += [rows.reshape(-1, rows.shape[-1]) for rows in out.pooler_output]
    return torch.cat(found)


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`."""
    out = model.model.language_model(
        inputs_embeds=embeds[None], past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state[0], out.past_key_values
