"""Idefics3 and SmolVLM: SigLIP tower, pixel shuffle, one projection, Llama decoder.

Absent keys of a config.json take the defaults of transformers' config classes (Idefics3Config,
Idefics3VisionConfig, LlamaConfig): published SmolVLM configs leave many of them out. A null
counts as absent.
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
from exporter.families.base import DecoderSpec, PromptInputs, ReaderFiles, TowerSpec
from exporter.families.config import choice, count, flag, image_token, positive, section
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.idefics3 import Idefics3Preparer, read_preparer
from exporter.families.shapes.idefics3 import idefics3
from exporter.families.specs.llama import DecoderNames, llama_spec

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("idefics3", "smolvlm")
TORCH_CLASSES = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        # The same in all versions; the short forms are adapters of the model without its head.
        (
            ("text_model", "model.text_model"),
            ("vision_model", "model.vision_model"),
            ("connector", "model.connector"),
        ),
        embedding="model.text_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
)
PUBLISHED: Mapping[str, PublishedLayout] = {}
SHAPES = {"idefics3": idefics3, "smolvlm": idefics3}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "image_token_id": 128257,
    "scale_factor": 2,
    "tie_word_embeddings": False,
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
    "vision_config.hidden_size": 1152,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 16,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 32,
    "vision_config.layer_norm_eps": 1e-6,
}
PROCESSORS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
DECODER = DecoderNames(
    prefix="model.text_model.",
    embedding="model.text_model.embed_tokens.weight",
    final_norm="model.text_model.norm.weight",
    head="lm_head.weight",
)
# Of Idefics3Config.
IMAGE_TOKEN = 128257
PROOF_TILES = 2


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The Llama decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    text = section(config, "text_config")
    choice(text, "model_type", "llama", ("llama",), "text_config")
    return llama_spec(text, DECODER, tied=flag(config, "tie_word_embeddings", False))


def tower_spec(config: Mapping[str, Any]) -> TowerSpec:
    """The vision tower and connector of a parsed config.json. Raises `InputRefused` on a bad config."""
    vision = section(config, "vision_config")
    where = "vision_config"
    channels = count(vision, "num_channels", 3, where)
    spec = TowerSpec(
        hidden_size=count(vision, "hidden_size", 1152, where),
        layers=count(vision, "num_hidden_layers", 12, where),
        heads=count(vision, "num_attention_heads", 16, where),
        intermediate_size=count(vision, "intermediate_size", 3072, where),
        patch_size=count(vision, "patch_size", 32, where),
        image_size=count(vision, "image_size", 224, where),
        norm_eps=positive(vision, "layer_norm_eps", 1e-6, where),
        activation=choice(vision, "hidden_act", ACTIVATIONS[0], ACTIVATIONS, where),
        shuffle=count(config, "scale_factor", 2, "config"),
        output_size=count(section(config, "text_config"), "hidden_size", 4096, "text_config"),
        prefix="model.vision_model.",
        projection="model.connector.modality_projection.proj.weight",
    )
    if channels != 3 or spec.hidden_size % spec.heads:
        raise InputRefused(
            f"config.json: {where} has {channels} channels, hidden size {spec.hidden_size} and "
            f"{spec.heads} heads; expected 3 channels and a hidden size divisible by the heads"
        )
    if spec.patches < 1 or spec.patches % spec.shuffle:
        raise InputRefused(
            f"config.json: {spec.patches} patches a side ({spec.image_size} / {spec.patch_size}) "
            f"cannot be shuffled by scale_factor {spec.shuffle}; expected a multiple of it"
        )
    return spec


def open_preparer(model_dir: Path) -> Idefics3Preparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    return read_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:
    """Processor classes of the model_type, and rows per tile."""
    kind = PROCESSORS[config["model_type"]]
    tokens = {"image_seq_len": tower_spec(config).tokens}
    return ReaderFiles(f"{kind}Processor", f"{kind}ImageProcessor", tokens, genai=True)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random tiles before the fifth token of `ids`."""
    tower = tower_spec(config)
    shape = (1, PROOF_TILES, 3, tower.image_size, tower.image_size)
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    token = image_token(config)
    image = np.full(PROOF_TILES * tower.tokens, IMAGE_TOKEN if token is None else token)
    ids = np.concatenate([ids[:4], image, ids[4:]])
    return {"input_ids": ids[None], "pixel_values": pixels}, PROOF_TILES


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[tiles * tokens, hidden]``, one tile at a time.

    Not through ``get_image_features``: that drops tiles of zeros.
    """
    import torch

    inner, pixels = model.model, inputs.pixel_values
    side = pixels.shape[-1] // model.config.vision_config.patch_size
    mask = torch.ones((1, side, side), dtype=torch.bool)
    rows = []
    for tile in torch.from_numpy(pixels):
        out = inner.vision_model(pixel_values=tile[None], patch_attention_mask=mask)
        rows.append(inner.connector(out.last_hidden_state)[0])
    return torch.cat(rows)


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same by transformers' own method. Tiles of exact zeros would be dropped as padding."""
    import torch

    found = model.get_image_features(pixel_values=torch.from_numpy(inputs.pixel_values)[None])
    tensors = getattr(found, "pooler_output", found)
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors])


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`."""
    out = model.model.text_model(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    return out.last_hidden_state[0], out.past_key_values
