"""The table of tests/contract/test_families.py: one row per family and kind of decoder.

A row writes a tiny random model folder as the family publishes it and says what the contract needs
to know of it. Everything else is read from the folder, as the product does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.catalog.profiles import find_model
from exporter.catalog.schema import AdapterRecipe
from exporter.families.base import PromptInputs
from tests.support.tiny import write_tiny_model
from tests.support.tiny_blip2 import write_tiny_blip2, write_tiny_xraygpt
from tests.support.tiny_cnn import write_tiny_cnn
from tests.support.tiny_gemma3 import SOFT_ID, write_tiny_gemma3
from tests.support.tiny_idefics import write_tiny_idefics
from tests.support.tiny_llava import write_tiny_llava, write_tiny_llava_med
from tests.support.tiny_moondream import write_tiny_moondream
from tests.support.tiny_qwen import IMAGE_ID, write_tiny_qwen
from tests.support.tiny_ved import write_tiny_ved

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Stems of module names: the newest, and another version's. The first that fits counts.
Renames = tuple[tuple[str, str], ...]
LLAVA_451: Renames = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
LLAVA_457: Renames = (("model.vision_tower.", "model.vision_tower.vision_model."),)
LLAVA_KEYS: Mapping[str, Renames] = {"4.51": LLAVA_451, "4.57": LLAVA_457}
QWEN_KEYS: Mapping[str, Renames] = {
    "4.51": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}
# Adapters of the model without its head.
HEADLESS_KEYS: Mapping[str, Renames] = {"without head": (("model.", ""),)}
LLAVA_MED_KEYS: Mapping[str, Renames] = {
    "published": (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    )
}
XRAYGPT_KEYS: Mapping[str, Renames] = {"published": (("language_model.", "llama_model."),)}
VIT_KEYS: Mapping[str, Renames] = {
    "4.57": tuple(
        (f"encoder.layers.{layer}.{new}.", f"encoder.encoder.layer.{layer}.{old}.")
        for layer in range(4)
        for new, old in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        )
    )
}
VISUAL = "vision_encoder.encoder.model.visual.blocks"
MOONDREAM_KEYS: Mapping[str, Renames] = {
    "inner class": (("model.", ""),),
    "2024": (
        *(
            (f"model.text.blocks.{layer}.{new}.", f"text_model.transformer.h.{layer}.{old}.")
            for layer in range(4)
            for new, old in (("attn.qkv", "mixer.Wqkv"), ("attn.proj", "mixer.out_proj"))
        ),
        ("model.text.blocks.", "text_model.transformer.h."),
        ("model.vision.blocks.", f"{VISUAL}."),
        ("model.vision.proj_mlp.", "vision_encoder.projection.mlp."),
    ),
}


@dataclass(frozen=True)
class FamilyCase:
    """One row.

    `write` writes the folder; `arguments` are those of the torch model for prepared inputs; `tiles`:
    (width, height) of an image in pixels by the number of tiles the tower gets for it; `adapter`: the
    name of the profile whose published recipe is trained, or a recipe of ours where the row's profiles
    have none; `keys`: names that adapters of other versions give the modules, empty where there is one
    layout alone; `kl`: the mean KL divergence in nats per token that a scheme may have on these random
    weights; `torch_base`: transformers reads the folder as it is; `one_image`: why a prompt cannot have
    several; `rows` makes of a torch model and its features the rows that the vision graph gives.
    """

    name: str
    write: Callable[[Path], Path]
    arguments: Callable[[PromptInputs], dict[str, torch.Tensor]]
    tiles: Mapping[int, tuple[int, int]]
    adapter: str | AdapterRecipe
    keys: Mapping[str, Renames]
    kl: Mapping[str, float]
    torch_base: bool = True
    one_image: str = ""
    rows: Callable[[Any, torch.Tensor], torch.Tensor] = lambda _, features: features

    @property
    def recipe(self) -> AdapterRecipe:
        """Modules and scaling of the adapter that the contract trains."""
        if isinstance(self.adapter, AdapterRecipe):
            return self.adapter
        recipe = find_model(self.adapter).adapter
        assert recipe is not None, f"profile {self.adapter} has no recipe"
        return recipe


def _idefics3(folder: Path) -> Path:
    write_tiny_model(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "size": {"longest_edge": 128}}))
    return folder


def _ids(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(inputs.input_ids)[None]}


def _one_batch(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    return {**_ids(inputs), "pixel_values": torch.from_numpy(inputs.pixel_values)[None]}


def _images(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    return {**_ids(inputs), "pixel_values": torch.from_numpy(inputs.pixel_values)}


def _anyres(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    """Images with fewer tiles than the largest are padded with tiles of zeros, as the processor does."""
    tiles: list[Any] = [feed["pixel_values"][0] for feed in inputs.vision]
    pixels = np.zeros((len(tiles), max(map(len, tiles)), *tiles[0].shape[1:]), np.float32)
    for place, image in zip(pixels, tiles, strict=True):
        place[: len(image)] = image
    sizes = torch.tensor(inputs.sizes)
    return {**_ids(inputs), "pixel_values": torch.from_numpy(pixels), "image_sizes": sizes}


def _patches(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    grids = [[1, *(feed["patch_positions"].max(axis=0) + 1)] for feed in inputs.vision]
    kinds = (inputs.input_ids == IMAGE_ID).astype(np.int64)
    return {
        **_ids(inputs),
        "mm_token_type_ids": torch.from_numpy(kinds)[None],
        "pixel_values": torch.from_numpy(inputs.pixel_values),
        "image_grid_thw": torch.tensor(np.array(grids)),
    }


def _caption(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(inputs.input_ids)[None]
    return {"decoder_input_ids": ids, "pixel_values": torch.from_numpy(inputs.pixel_values)}


def _seen(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    """Images and, for the tokens of a longer text too, what transformers' processor says they see."""
    assert inputs.image_mask is not None
    later = np.repeat(inputs.image_mask[-1:], len(inputs.input_ids) - len(inputs.image_mask), 0)
    mask = np.concatenate([inputs.image_mask, later])
    return {**_one_batch(inputs), "image_attention_mask": torch.from_numpy(mask)[None]}


def _gated_rows(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Keys and values of IDEFICS' gated blocks out of the resampled rows."""
    parts = []
    for block in model.model.gated_cross_attn_layers:
        attention = block.cross_attn
        keys = attention.k_proj(features).unflatten(-1, (attention.num_heads, -1))
        parts += [attention.k_layer_norm(keys).flatten(1), attention.v_proj(features)]
    return torch.cat(parts, dim=-1)


def _qwen(kind: str) -> Callable[[Path], Path]:
    return lambda folder: write_tiny_qwen(folder, kind)


def _next(decoder: str) -> Callable[[Path], Path]:
    return lambda folder: write_tiny_llava(folder, kind="llava_next", decoder=decoder)


def _crops(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    """The inputs of the vision graph as they are."""
    (feed,) = inputs.vision
    return {
        **_ids(inputs),
        **{k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in feed.items()},
    }


def _kinds(inputs: PromptInputs) -> dict[str, torch.Tensor]:
    """Images, and which tokens are theirs."""
    kinds = (inputs.input_ids == SOFT_ID).astype(np.int64)
    return {**_images(inputs), "token_type_ids": torch.from_numpy(kinds)[None]}


# Images have no tiles but patches: as many as their shape asks for.
PATCHES = {256: (64, 64), 192: (97, 31), 4: (8, 8)}
ANYRES = {3: (60, 30), 4: (32, 96), 5: (64, 64), 17: (300, 280)}
# Measured: up to 0.0002 and 0.016 (Idefics3, LLaVA), 0.0014 and 0.088 (Qwen-VL).
KL = {"int8": 0.001, "int4-rtn": 0.05}
QWEN_KL = {"int8": 0.005, "int4-rtn": 0.25}
# Measured: up to 0.0009 and 0.055, with weights large enough for its greedy text to vary.
IDEFICS_KL = {"int8": 0.003, "int4-rtn": 0.2}
CASES = (
    FamilyCase(
        "idefics3",
        _idefics3,
        _one_batch,
        {5: (128, 32), 9: (100, 50), 17: (100, 100)},
        "smolvlm-500m",
        HEADLESS_KEYS,
        KL,
    ),
    FamilyCase("llava", write_tiny_llava, _images, {1: (70, 50)}, "llava-1.5-7b", LLAVA_KEYS, KL),
    FamilyCase(
        "llava_next-mistral",
        _next("mistral"),
        _anyres,
        ANYRES,
        "llava-v1.6-mistral-7b",
        LLAVA_KEYS,
        KL,
    ),
    FamilyCase(
        "llava_next-llama",
        _next("llama"),
        _anyres,
        ANYRES,
        "llava-v1.6-vicuna-7b",
        LLAVA_KEYS,
        KL,
    ),
    FamilyCase(
        "llava-med",
        write_tiny_llava_med,
        _images,
        {1: (70, 50)},
        AdapterRecipe(ALL, 2.0),
        LLAVA_MED_KEYS,
        KL,
        torch_base=False,
    ),
    FamilyCase(
        "blip2-opt",
        write_tiny_blip2,
        _images,
        {1: (70, 50)},
        AdapterRecipe(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), 2.0),
        {},
        KL,
    ),
    FamilyCase(
        "xraygpt",
        write_tiny_xraygpt,
        _images,
        {1: (70, 50)},
        AdapterRecipe(ALL, 2.0),
        XRAYGPT_KEYS,
        KL,
        torch_base=False,
    ),
    FamilyCase("gemma3", write_tiny_gemma3, _kinds, {1: (70, 50)}, "medgemma-4b", LLAVA_KEYS, KL),
    FamilyCase(
        "qwen2_vl",
        _qwen("qwen2_vl"),
        _patches,
        PATCHES,
        "qwen2-vl-2b-instruct",
        QWEN_KEYS,
        QWEN_KL,
    ),
    FamilyCase(
        "qwen2_5_vl",
        _qwen("qwen2_5_vl"),
        _patches,
        PATCHES,
        "qwen2.5-vl-3b-instruct",
        QWEN_KEYS,
        QWEN_KL,
    ),
    FamilyCase(
        "vit-gpt2",
        write_tiny_ved,
        _caption,
        {1: (70, 50)},
        # The decoder's matrices, and the tower's, whose names have changed.
        AdapterRecipe(("c_attn", "c_proj", "c_fc", "q_attn", "q_proj", "o_proj", "fc1"), 2.0),
        VIT_KEYS,
        KL,
        one_image="the decoder sees the image by cross-attention",
    ),
    FamilyCase(
        "cnn-transformer",
        write_tiny_cnn,
        _images,
        {1: (70, 50)},
        AdapterRecipe(("linear1", "linear2", "project"), 2.0),
        {},
        KL,
        one_image="the decoder sees the image by cross-attention",
    ),
    FamilyCase(
        "idefics",
        write_tiny_idefics,
        _seen,
        {1: (70, 50)},
        "idefics-9b-instruct",
        HEADLESS_KEYS,
        IDEFICS_KL,
        rows=_gated_rows,
    ),
    FamilyCase(
        "moondream2",
        write_tiny_moondream,
        _crops,
        {2: (13, 77), 10: (64, 64), 13: (97, 31)},
        "moondream2",
        MOONDREAM_KEYS,
        KL,
        torch_base=False,
        one_image="start token and image are one prefix that is seen both ways",
    ),
)
