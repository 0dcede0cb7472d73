"""Qwen2-VL and Qwen2.5-VL: images at their own shape, a Qwen2 decoder with three-axis positions.

Published config.json files are flat (the decoder's settings beside ``vision_config``); transformers
5 writes them into ``text_config``. Both are read. Tensors have their newest names: merging brings
older layouts to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import DecoderSpec, PromptInputs, ReaderFiles
from exporter.families.config import flag, positive, section
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.qwen import QwenPreparer, read_preparer
from exporter.families.shapes.qwen_vl import qwen2_5_vl, qwen2_vl
from exporter.families.specs.llama import DecoderNames, llama_spec
from exporter.families.specs.qwen_vision import QwenVisionSpec, grid_of, read_vision

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
TORCH_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
PUBLISHED: Mapping[str, PublishedLayout] = {}
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        (
            ("model.layers", "model.language_model.layers"),  # <= 4.51
            ("model.embed_tokens", "model.language_model.embed_tokens"),  # <= 4.51
            ("model.norm", "model.language_model.norm"),  # <= 4.51
            ("visual", "model.visual"),  # <= 4.51
            ("language_model", "model.language_model"),
        ),
        embedding="model.language_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
)
SHAPES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling.mrope_section": (16, 24, 24),
    "vision_config.depth": 32,
    "vision_config.num_heads": 16,
    "vision_config.embed_dim": 1280,
    "vision_config.hidden_size": 3584,
    "vision_config.mlp_ratio": 4,
    "vision_config.intermediate_size": 3420,
    "vision_config.out_hidden_size": 3584,
    "vision_config.in_chans": 3,
    "vision_config.patch_size": 14,
    "vision_config.spatial_merge_size": 2,
    "vision_config.temporal_patch_size": 2,
    "vision_config.tokens_per_second": 4,
    "vision_config.window_size": 112,
    "vision_config.fullatt_block_indexes": (7, 15, 23, 31),
}
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
# Of Qwen2VLTextConfig and Qwen2_5_VLTextConfig, where they differ from LlamaConfig's.
DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
ROPE_THETA = 1e6
SECTIONS = (16, 24, 24)
AXES = len(SECTIONS)
IMAGE_TOKEN = 151655
DECODER = DecoderNames(
    prefix="model.language_model.",
    embedding="model.language_model.embed_tokens.weight",
    final_norm="model.language_model.norm.weight",
    head="lm_head.weight",
)
VISION = "model.visual."
# Rows and columns of feature rows of the images of a merge's proof.
PROOF_GRIDS = ((2, 3), (1, 2))


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The Qwen2 decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    text, where = _text(config)
    if text.get("use_sliding_window") or set(text.get("layer_types") or ()) - {"full_attention"}:
        raise InputRefused(
            f"config.json: {where} asks for sliding attention; only full attention is known"
        )
    theta, sections = _rotary(text, where)
    given = {key: value for key, value in text.items() if value is not None}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    # transformers 5: tied when either place says so.
    tied = flag(config, "tie_word_embeddings", False) or flag(text, "tie_word_embeddings", False)
    spec = llama_spec({**DEFAULTS, **given, **plain}, DECODER, tied=tied, where=where)
    if sum(sections) * 2 != spec.head_dim:
        raise InputRefused(
            f"config.json: mrope_section is {list(sections)}; expected three numbers with the sum "
            f"{spec.head_dim // 2}, half the head size"
        )
    return replace(spec, qkv_bias=True, mrope=sections)


def tower_spec(config: Mapping[str, Any]) -> QwenVisionSpec:
    """The vision part of a parsed config.json. Raises `InputRefused` on a bad config."""
    spec = read_vision(config, gated=config.get("model_type") == "qwen2_5_vl", prefix=VISION)
    hidden = decoder_spec(config).hidden_size
    if spec.output_size != hidden:
        raise InputRefused(
            f"config.json: the vision part gives rows of {spec.output_size}, the decoder has a hidden "
            f"size of {hidden}; expected the same"
        )
    return spec


def open_preparer(model_dir: Path) -> QwenPreparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    return read_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:
    """Processor classes of the model_type. onnxruntime-genai cannot feed three-axis positions."""
    kind = PROCESSORS[config["model_type"]]
    return ReaderFiles(kind, "Qwen2VLImageProcessor", {}, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images of different shape before the fifth and the ninth token of `ids`."""
    spec = tower_spec(config)
    token = config.get("image_token_id", IMAGE_TOKEN)
    first, second = (np.full(h * w, token) for h, w in PROOF_GRIDS)
    ids = np.concatenate([ids[:4], first, ids[4:8], second, ids[8:]])
    grids = np.array([[1, h * spec.merge, w * spec.merge] for h, w in PROOF_GRIDS])
    patches = int(grids.prod(axis=1).sum())
    return {
        "input_ids": ids[None],
        "mm_token_type_ids": (ids == token)[None].astype(np.int64),
        "pixel_values": rng.uniform(-1, 1, (patches, spec.patch_values)).astype(np.float32),
        "image_grid_thw": grids,
    }, len(PROOF_GRIDS)


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Feature rows ``[rows, hidden]``, one image at a time."""
    import torch

    rows = []
    for feed in inputs.vision:
        grid = torch.tensor([[1, *grid_of(feed)]])
        out = model.model.visual(torch.from_numpy(feed["pixel_values"]), grid_thw=grid)
        rows.append(out.pooler_output)
    return torch.cat(rows)


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same by transformers' own method, all images at once."""
    import torch

    pixels = np.concatenate([feed["pixel_values"] for feed in inputs.vision])
    grids = torch.tensor([[1, *grid_of(feed)] for feed in inputs.vision])
    found = model.get_image_features(torch.from_numpy(pixels), image_grid_thw=grids)
    return torch.cat(list(found.pooler_output))


def torch_append(
    model: Any, embeds: torch.Tensor, cache: Any, positions: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`. Raises ValueError without positions."""
    if positions is None:
        raise ValueError(f"a prompt of this family has {AXES} positions per token")
    out = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[0], out.past_key_values


def _text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The decoder's settings and where they stand."""
    if config.get("text_config") is None:
        return config, "config"
    return section(config, "text_config"), "text_config"


def _rotary(text: Mapping[str, Any], where: str) -> tuple[float, tuple[int, ...]]:
    """Base of the frequencies and sections of M-RoPE."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputRefused(f"config.json: {where}.rope_scaling is {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    # transformers writes "default" for what the published files call "mrope".
    if kind not in ("mrope", "default"):
        raise InputRefused(f"config.json: rope_type is {kind!r}; only 'mrope' is known")
    sections = rope.get("mrope_section") or SECTIONS
    if len(sections) != AXES or not all(type(n) is int and n > 0 for n in sections):
        raise InputRefused(
            f"config.json: mrope_section is {sections!r}; expected {AXES} positive integers"
        )
    source = rope if rope.get("rope_theta") is not None else text
    return positive(source, "rope_theta", ROPE_THETA, where), tuple(sections)
