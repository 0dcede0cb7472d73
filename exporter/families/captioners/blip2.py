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

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import DecoderSpec, PromptInputs, ReaderFiles
from exporter.families.config import choice, flag, image_token, section
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import TEMPLATE_FILE, PublishedLayout, modern
from exporter.families.layouts.xraygpt import (
    CLASS,
    IMAGES,
    JOINS,
    MODEL_TYPE,
    NAMES,
    PUBLISHED_TYPE,
    TEMPLATE,
    xraygpt_config,
)
from exporter.families.prompts.blip2 import Blip2Preparer, read_blip2_preparer
from exporter.families.shapes.cross import blip2
from exporter.families.specs.blip2_vision import Blip2Vision, blip2_vision
from exporter.families.specs.llama import DecoderNames, llama_spec
from exporter.families.specs.opt import OptSpec, opt_spec

if TYPE_CHECKING:
    import torch

MODEL_TYPES = (MODEL_TYPE, PUBLISHED_TYPE)
TORCH_CLASSES = {MODEL_TYPE: CLASS, PUBLISHED_TYPE: CLASS}
PUBLISHED = {
    PUBLISHED_TYPE: PublishedLayout(
        xraygpt_config,
        NameMap(NAMES),
        "Vicuna's tokenizer.model is Llama's: let transformers' AutoTokenizer save one",
        {TEMPLATE_FILE: TEMPLATE, "preprocessor_config.json": IMAGES},
        joins=JOINS,
    )
}
LAYOUTS = (
    Layout(
        (MODEL_TYPE,),
        (),
        embedding="language_model.model.decoder.embed_tokens.weight",
        head="language_model.lm_head.weight",
        text_type="opt",
    ),
    Layout(
        MODEL_TYPES,
        NAMES,
        embedding="language_model.model.embed_tokens.weight",
        head="language_model.lm_head.weight",
    ),
)
SHAPES = {MODEL_TYPE: blip2, PUBLISHED_TYPE: blip2}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "num_query_tokens": 32,
    "image_token_index": None,
    "tie_word_embeddings": None,
    # Computed by the class, whatever the file says.
    "use_decoder_only_language_model": True,
    "text_config.model_type": None,
    # OPTConfig's, whose own names the last two are; published files say which they mean.
    "text_config.hidden_size": 768,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 12,
    "text_config.vocab_size": 50272,
    "text_config.max_position_embeddings": 2048,
    "text_config.ffn_dim": 3072,
    "text_config.word_embed_proj_dim": None,
    # LlamaConfig's alone.
    "text_config.intermediate_size": 11008,
    "text_config.num_key_value_heads": None,
    "text_config.rms_norm_eps": 1e-6,
    "vision_config.hidden_size": 1408,
    "vision_config.intermediate_size": 6144,
    "vision_config.num_hidden_layers": 39,
    "vision_config.num_attention_heads": 16,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 14,
    "vision_config.layer_norm_eps": 1e-6,
    "qformer_config.vocab_size": 30522,
    "qformer_config.hidden_size": 768,
    "qformer_config.intermediate_size": 3072,
    "qformer_config.num_hidden_layers": 12,
    "qformer_config.num_attention_heads": 12,
    "qformer_config.encoder_hidden_size": 1408,
    "qformer_config.cross_attention_frequency": 2,
}
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
    config = modern(config, PUBLISHED)
    text = section(config, "text_config")
    # Without a default: names of tensors follow from it.
    opt = choice(text, "model_type", "", ("opt", "llama"), "text_config") == "opt"
    tied = flag(config, "tie_word_embeddings", flag(text, "tie_word_embeddings", opt))
    if opt:
        return opt_spec(text, prefix=OPT, head=HEAD, tied=tied)
    return llama_spec(text, LLAMA, tied=tied)


def tower_spec(config: Mapping[str, Any]) -> Blip2Vision:
    """Tower, Q-Former and projection of a parsed config.json. Raises `InputRefused`."""
    return blip2_vision(modern(config, PUBLISHED), decoder_spec(config).hidden_size)


def open_preparer(model_dir: Path) -> Blip2Preparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = modern(read_config(model_dir / "config.json"), PUBLISHED)
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
