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

from exporter.catalog.schema import Value
from exporter.core.modelfiles import read_config
from exporter.families.base import DecoderSpec, Feed, PromptInputs, ReaderFiles
from exporter.families.config import choice, flag, image_token, section
from exporter.families.images.anyres import config_grid, feature_index
from exporter.families.layouts.llava_med import (
    LLAVA_MED_IMAGES,
    LLAVA_MED_TEMPLATE,
    llava_med_config,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import TEMPLATE_FILE, PublishedLayout, modern
from exporter.families.prompts.llava import IMAGE, IMAGE_TOKEN, LlavaPreparer, read_llava_preparer
from exporter.families.shapes.llava import llava, llava_next
from exporter.families.specs.llama import DecoderNames, llama_spec, mistral_spec
from exporter.families.specs.llava_vision import LlavaVision, llava_vision

if TYPE_CHECKING:
    import torch

NEXT = "llava_next"
MODEL_TYPES = ("llava", "llava_next", "llava_mistral")
TORCH_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_mistral": "LlavaForConditionalGeneration",
}
LLAVA_MED = PublishedLayout(
    llava_med_config,
    NameMap(
        (
            ("model.embed_tokens", "model.language_model.embed_tokens"),
            ("model.layers", "model.language_model.layers"),
            ("model.norm", "model.language_model.norm"),
            ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
            ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
            ("model.vision_tower.vision_tower.vision_model", "model.vision_tower"),
        )
    ),
    "it publishes tokenizer.model alone: take that of mistralai/Mistral-7B-Instruct-v0.2, which has "
    "the same tokens, or let transformers' AutoTokenizer save one",
    {TEMPLATE_FILE: LLAVA_MED_TEMPLATE, "preprocessor_config.json": LLAVA_MED_IMAGES},
)
PUBLISHED = {"llava_mistral": LLAVA_MED}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = (
    Layout(
        ("llava", NEXT),
        (
            ("language_model.lm_head", "lm_head"),  # <= 4.51
            ("language_model.model", "model.language_model"),  # <= 4.51
            ("language_model", "model.language_model"),
            ("vision_tower", "model.vision_tower"),  # <= 4.51
            ("multi_modal_projector", "model.multi_modal_projector"),  # <= 4.51
            ("image_newline", "model.image_newline"),  # <= 4.51
            ("model.vision_tower.vision_model", "model.vision_tower"),  # <= 4.57
        ),
        EMBEDDING,
        HEAD,
    ),
    Layout(("llava_mistral",), LLAVA_MED.names.pairs, EMBEDDING, HEAD),
)
SHAPES = {"llava": llava, "llava_mistral": llava, NEXT: llava_next}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "image_token_index": 32000,
    "use_image_newline_parameter": True,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "text_config.model_type": "llama",
    "text_config.hidden_size": 4096,
    "text_config.intermediate_size": 11008,
    "text_config.num_hidden_layers": 32,
    "text_config.num_attention_heads": 32,
    "text_config.num_key_value_heads": None,
    "text_config.head_dim": None,
    "text_config.vocab_size": 32000,
    "text_config.max_position_embeddings": 2048,
    "text_config.rms_norm_eps": 1e-6,
    "text_config.rope_theta": 10000.0,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 32,
    "vision_config.layer_norm_eps": 1e-5,
    # LLaVA-Med's own keys beside each other, read with MistralConfig's defaults.
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}
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
    config = modern(config, PUBLISHED)
    text = section(config, "text_config")
    kind = choice(text, "model_type", "llama", tuple(DECODERS), "text_config")
    tied = flag(config, "tie_word_embeddings", flag(text, "tie_word_embeddings", False))
    return DECODERS[kind](text, DECODER, tied=tied)


def tower_spec(config: Mapping[str, Any]) -> LlavaVision:
    """Tower, projector and newline of a parsed config.json. Raises `InputRefused` on a bad config."""
    config = modern(config, PUBLISHED)
    return llava_vision(config, newline=config["model_type"] == NEXT)


def open_preparer(model_dir: Path) -> LlavaPreparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = modern(read_config(model_dir / "config.json"), PUBLISHED)
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
