"""IDEFICS of transformers (arXiv 2306.16527): CLIP tower, perceiver resampler, gated cross-attention in a Llama.

Not Idefics2 or Idefics3, which put the image's rows into the text. Absent keys of a config.json take
the defaults of IdeficsConfig and its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import PromptInputs, ReaderFiles
from exporter.families.config import choice, count, flag, section
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import SAVE_TOKENIZER, TEMPLATE_FILE, PublishedLayout
from exporter.families.prompts.idefics import TEMPLATE, IdeficsPreparer, read_idefics_preparer
from exporter.families.prompts.visible import VisibleImages
from exporter.families.shapes.cross import idefics
from exporter.families.specs.clip_tower import clip_tower
from exporter.families.specs.idefics import GatedLlama, Perceiver, ResampledVision
from exporter.families.specs.llama import DecoderNames, llama_spec

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("idefics",)
TORCH_CLASSES = {"idefics": "IdeficsForVisionText2Text"}
# Names and config are transformers' own.
PUBLISHED = {
    "idefics": PublishedLayout(dict, NameMap(()), SAVE_TOKENIZER, {TEMPLATE_FILE: TEMPLATE})
}
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        # The same in all versions; the short forms are adapters of the model without its head.
        (
            ("layers", "model.layers"),
            ("gated_cross_attn_layers", "model.gated_cross_attn_layers"),
            ("perceiver_resampler", "model.perceiver_resampler"),
            ("vision_model", "model.vision_model"),
            ("embed_tokens", "model.embed_tokens"),
        ),
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
    ),
)
SHAPES = {"idefics": idefics}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "alpha_type": "float",
    "vision_config.embed_dim": 768,
    "vision_config.image_size": 224,
    "vision_config.intermediate_size": 5120,
    "vision_config.patch_size": 14,
    "vision_config.num_attention_heads": 16,
    "vision_config.num_hidden_layers": 32,
    "perceiver_config.qk_layer_norms_perceiver": False,
    "perceiver_config.resampler_depth": 6,
    "perceiver_config.resampler_head_dim": 96,
    "perceiver_config.resampler_n_heads": 16,
    "perceiver_config.resampler_n_latents": 64,
}
DECODER = DecoderNames(
    prefix="model.",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
)
TOWER, PERCEIVER = "model.vision_model.", "model.perceiver_resampler."
TOWER_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "image_size": 224,
    "patch_size": 14,
}
PROOF_IMAGES = 2


def decoder_spec(config: Mapping[str, Any]) -> GatedLlama:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    where = "config"
    _expect(config, "use_resampler", True, default=False)
    _expect(config, "tie_word_embeddings", False, default=False)
    # Here these concern the gated blocks and the image, not the Llama blocks.
    plain = {k: v for k, v in config.items() if k not in ("qk_layer_norms", "use_resampler")}
    llama = llama_spec(plain, DECODER, tied=True, where=where)
    interval = count(config, "cross_layer_interval", 1, where)
    if llama.layers % interval or llama.heads != llama.kv_heads:
        raise InputRefused(
            f"config.json: {llama.layers} layers with cross_layer_interval {interval}, {llama.heads} heads "
            f"and {llama.kv_heads} key-value heads; expected a multiple of it, and as many of both heads"
        )
    kind = choice(config, "alpha_type", "float", ("float", "vector"), where)
    perceiver = _part(config, "perceiver_config")
    # Unlike all other sizes this one may be zero: a model without added tokens.
    extra = "additional_vocab_size"
    return GatedLlama(
        llama=llama,
        interval=interval,
        added=count(config, extra, 0, where) if config.get(extra) else 0,
        latents=count(perceiver, "resampler_n_latents", 64, "perceiver_config"),
        image_width=_tower_sizes(config)["hidden_size"],
        qk_norms=flag(config, "qk_layer_norms", False),
        alpha=(1,) if kind == "float" else (1, 1, llama.hidden_size),
    )


def tower_spec(config: Mapping[str, Any]) -> ResampledVision:
    """Tower, perceiver and cross keys and values of a parsed config.json. Raises `InputRefused`."""
    vision, raw = _part(config, "vision_config"), _part(config, "perceiver_config")
    filled = {**_tower_sizes(config), "hidden_act": vision.get("hidden_act") or "gelu"}
    rest = {k: vision[k] for k in ("layer_norm_eps", "num_channels") if k in vision}
    tower = clip_tower({**filled, **rest}, TOWER, defaults=TOWER_SIZES, feature_layer=-1)
    decoder, where = decoder_spec(config), "perceiver_config"
    perceiver = Perceiver(
        width=tower.hidden_size,
        inner=4 * tower.hidden_size,
        depth=count(raw, "resampler_depth", 6, where),
        heads=count(raw, "resampler_n_heads", 16, where),
        head_dim=count(raw, "resampler_head_dim", 96, where),
        latents=decoder.latents,
        qk_norms=flag(raw, "qk_layer_norms_perceiver", False),
        prefix=PERCEIVER,
    )
    return ResampledVision(tower, perceiver, decoder)


def open_preparer(model_dir: Path) -> IdeficsPreparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    side = tower_spec(config).tower.image_size
    return read_idefics_preparer(model_dir, config, decoder_spec(config), side)


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:  # noqa: ARG001 (the same for all)
    """Processor classes; a chain of graphs has nowhere to take the image mask from."""
    return ReaderFiles("IdeficsProcessor", "IdeficsImageProcessor", {}, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images; the first tokens see none, the next ones the first, the rest the second."""
    side = tower_spec(config).tower.image_size
    pixels: NDArray[Any] = rng.uniform(-1, 1, (1, PROOF_IMAGES, 3, side, side)).astype(np.float32)
    mask = np.zeros((1, len(ids), PROOF_IMAGES), np.int64)
    mask[:, 4:12, 0], mask[:, 12:, 1] = 1, 1
    return {
        "input_ids": ids[None],
        "pixel_values": pixels,
        "image_attention_mask": mask,
    }, PROOF_IMAGES


@dataclass(frozen=True)
class IdeficsText:
    """A text being decoded by the torch model: its images' rows ``[1, images, latents, width]``, which
    of them the next tokens see, and the cache of its Llama blocks (None: empty).
    """

    images: torch.Tensor
    visible: VisibleImages
    cache: Any


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The resampled rows of all images, ``[images * latents, width]``."""
    import torch

    inner, pixels = model.model, torch.from_numpy(inputs.pixel_values)
    states = inner.vision_model(pixel_values=pixels).last_hidden_state
    rows: torch.Tensor = inner.perceiver_resampler(states)
    return rows.flatten(0, 1)


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Keys and values of the gated blocks, ``[images * latents, blocks * 2 * hidden]``, as they pass
    through transformers' own forward.
    """
    import torch

    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    hooks = []
    for block in model.model.gated_cross_attn_layers:
        attention = block.cross_attn
        last = attention.k_layer_norm if attention.qk_layer_norms else attention.k_proj
        for module, kept in ((last, keys), (attention.v_proj, values)):
            hooks.append(module.register_forward_hook(lambda _m, _a, out, to=kept: to.append(out)))
    try:
        model.model(
            input_ids=torch.from_numpy(inputs.input_ids)[None],
            pixel_values=torch.from_numpy(inputs.pixel_values)[None],
            image_attention_mask=torch.from_numpy(inputs.image_mask)[None],
        )
    finally:
        for hook in hooks:
            hook.remove()
    # A norm gives heads before rows, a projection gives rows alone.
    flat = [k[0].transpose(0, 1).flatten(1) if k.ndim == 4 else k[0] for k in keys]
    pairs = zip(flat, (v[0] for v in values), strict=True)
    return torch.cat([part for pair in pairs for part in pair], dim=-1)


def torch_start(model: Any, features: torch.Tensor, inputs: PromptInputs) -> IdeficsText:  # noqa: ARG001
    """See `families.base.CrossFamily.torch_start`."""
    images = features.reshape(1, len(inputs.pixel_values), -1, features.shape[-1])
    return IdeficsText(images, VisibleImages(inputs.image_mask), None)


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: IdeficsText,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, IdeficsText]:
    """See `families.base.Family.torch_append`; `cache` comes from `torch_start`."""
    import torch

    rows = cache.visible.take(len(embeds))
    out = model.model(
        inputs_embeds=embeds[None],
        past_key_values=cache.cache,
        use_cache=True,
        perceiver_embeddings=cache.images,
        image_attention_mask=torch.from_numpy(rows)[None],
    )
    text = IdeficsText(cache.images, cache.visible, out.past_key_values)
    return out.last_hidden_state[0], text


def _expect(config: Mapping[str, Any], key: str, expected: bool, *, default: bool) -> None:
    if flag(config, key, default) is not expected:
        raise InputRefused(f"config.json: {key} is {not expected}; only {expected} is known")


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the config, which may be absent as a whole."""
    return section(config, key) if config.get(key) is not None else {}


def _tower_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    vision = _part(config, "vision_config")
    names = {key: "embed_dim" if key == "hidden_size" else key for key in TOWER_SIZES}
    return {
        key: count(vision, names[key], default, "vision_config")
        for key, default in TOWER_SIZES.items()
    }
