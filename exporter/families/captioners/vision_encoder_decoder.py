"""VisionEncoderDecoder of transformers: a ViT and a GPT-2 with cross-attention (ViT-GPT2 captioning).

Tensors have their newest names: merging brings the published ones, of transformers up to 4.57, to
them. Absent keys of a config.json take the defaults of ViTConfig and GPT2Config.
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
from exporter.families.base import PromptInputs, ReaderFiles
from exporter.families.config import choice, section
from exporter.families.images.vit import read_vit_settings
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.prefix import PrefixPreparer, read_prefix_preparer
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.cross import vision_encoder_decoder
from exporter.families.specs.gpt2 import Gpt2Spec, gpt2_spec
from exporter.families.specs.vit_tower import CrossVit, cross_vit

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("vision-encoder-decoder",)
TORCH_CLASSES = {"vision-encoder-decoder": "VisionEncoderDecoderModel"}
PUBLISHED: Mapping[str, PublishedLayout] = {}
VIT = "encoder.layers.*"
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        (  # <= 4.57
            ("encoder.encoder.layer", "encoder.layers"),
            (f"{VIT}.attention.attention.query", f"{VIT}.attention.q_proj"),
            (f"{VIT}.attention.attention.key", f"{VIT}.attention.k_proj"),
            (f"{VIT}.attention.attention.value", f"{VIT}.attention.v_proj"),
            (f"{VIT}.attention.output.dense", f"{VIT}.attention.o_proj"),
            (f"{VIT}.intermediate.dense", f"{VIT}.mlp.fc1"),
            (f"{VIT}.output.dense", f"{VIT}.mlp.fc2"),
        ),
        embedding="decoder.transformer.wte.weight",
        head="decoder.lm_head.weight",
        conv1d=CONV1D,
    ),
    # The decoder on its own, which can be merged.
    Layout(
        ("gpt2",),
        (
            ("h", "transformer.h"),
            ("wte", "transformer.wte"),
            ("wpe", "transformer.wpe"),
            ("ln_f", "transformer.ln_f"),
        ),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        conv1d=CONV1D,
    ),
)
SHAPES = {"vision-encoder-decoder": vision_encoder_decoder}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "decoder_start_token_id": None,
    "decoder.model_type": None,
    "decoder.n_positions": 1024,
    "decoder.n_embd": 768,
    "decoder.n_head": 12,
    "decoder.n_layer": 12,
    "decoder.vocab_size": 50257,
    "decoder.layer_norm_epsilon": 1e-5,
    "decoder.activation_function": "gelu_new",
    "decoder.add_cross_attention": False,
    "decoder.tie_word_embeddings": True,
    "encoder.model_type": None,
    "encoder.hidden_size": 768,
    "encoder.intermediate_size": 3072,
    "encoder.num_hidden_layers": 12,
    "encoder.num_attention_heads": 12,
    "encoder.image_size": 224,
    "encoder.patch_size": 16,
    "encoder.num_channels": 3,
    "encoder.qkv_bias": True,
    "encoder.layer_norm_eps": 1e-12,
}
# Trained without an instruction: a prompt would become the beginning of the caption.
DEFAULT_PROMPT = ""
TEXT, HEAD = "decoder.transformer.", "decoder.lm_head.weight"
VISION, PROJECTION = "encoder.", "enc_to_dec_proj"
# Two images, each with the whole text of a merge's proof.
PROOF_IMAGES = 2


def decoder_spec(config: Mapping[str, Any]) -> Gpt2Spec:
    """The GPT-2 decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    decoder = section(config, "decoder")
    # Without a default: another decoder would be read with GPT-2's sizes.
    choice(decoder, "model_type", "", ("gpt2",), "decoder")
    return gpt2_spec(decoder, TEXT, HEAD)


def tower_spec(config: Mapping[str, Any]) -> CrossVit:
    """Encoder and cross keys and values of a parsed config.json. Raises `InputRefused`."""
    encoder = section(config, "encoder")
    choice(encoder, "model_type", "", ("vit",), "encoder")
    return cross_vit(encoder, decoder_spec(config), VISION, PROJECTION)


def open_preparer(model_dir: Path) -> PrefixPreparer:
    """Tokenizer, image settings and start token of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    decoder, tower = decoder_spec(config), tower_spec(config).tower
    images = read_vit_settings(*read_image_settings(model_dir))
    if images.output() != (tower.image_size, tower.image_size):
        raise InputRefused(
            f"{model_dir / 'preprocessor_config.json'}: images become {images.output()} pixels (height, "
            f"width), config.json's encoder takes squares of {tower.image_size}"
        )
    top = {key: value for key, value in config.items() if value is not None}
    return read_prefix_preparer(model_dir, {**section(config, "decoder"), **top}, decoder, images)


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:  # noqa: ARG001 (the same for all)
    """The image processor's class; there is no joint processor, and no chain of graphs to run."""
    return ReaderFiles("", "ViTImageProcessor", {}, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images, each captioned with `ids`."""
    side = tower_spec(config).tower.image_size
    pixels = rng.uniform(-1, 1, (PROOF_IMAGES, 3, side, side)).astype(np.float32)
    texts = np.repeat(ids[None], PROOF_IMAGES, axis=0)
    return {"decoder_input_ids": texts, "pixel_values": pixels}, PROOF_IMAGES


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Cross keys and values of every decoder layer: ``[rows, layers * 2 * hidden]``."""
    import torch

    pixels = torch.from_numpy(inputs.pixel_values)
    states = model.encoder(pixel_values=pixels).last_hidden_state
    if hasattr(model, PROJECTION):
        states = model.enc_to_dec_proj(states)
    blocks = model.decoder.transformer.h
    return torch.cat([block.crossattention.c_attn(states) for block in blocks], dim=-1)[0]


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same out of the cache that transformers' own forward fills."""
    import torch

    start = torch.from_numpy(inputs.input_ids[:1])[None]
    pixels = torch.from_numpy(inputs.pixel_values)
    cache = model(
        pixel_values=pixels, decoder_input_ids=start, use_cache=True
    ).past_key_values.cross_attention_cache
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=-1)


def torch_start(
    model: Any,
    features: torch.Tensor,
    inputs: PromptInputs,  # noqa: ARG001 (one image, which all tokens see)
) -> Any:
    """See `families.base.CrossFamily.torch_start`."""
    from transformers import DynamicCache, EncoderDecoderCache

    heads, cross = model.config.decoder.num_attention_heads, DynamicCache()
    parts = features.chunk(2 * len(model.decoder.transformer.h), dim=-1)
    for place, part in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        key, value = (p.reshape(len(p), heads, -1).transpose(0, 1)[None] for p in part)
        cross.update(key, value, place)
    return EncoderDecoderCache(DynamicCache(), cross)


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`; `cache` comes from `torch_start`."""
    out = model.decoder.transformer(
        inputs_embeds=embeds[None],
        past_key_values=cache,
        use_cache=True,
        # Only says that there is an image: its keys and values are in the cache.
        encoder_hidden_states=embeds.new_zeros((1, 1, embeds.shape[-1])),
    )
    return out.last_hidden_state[0], out.past_key_values
