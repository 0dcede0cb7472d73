"""Adapters made with peft on a tiny model, with random weights in place of training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.core.modelfiles import read_config
from exporter.families.torch_classes import is_own
from exporter.runtimes.torch_reference import load_model

STRENGTH = 0.05


def load(folder: Path) -> Any:
    """The model of `folder` in float32, as transformers loads it (or a family's own class)."""
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    config = read_config(folder / "config.json")
    if is_own(config):
        return load_model(folder, config)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def randomise(model: Any, seed: int) -> None:
    """Move every trainable value: peft starts with B at zero, an adapter that does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(STRENGTH * noise)


def write_adapter(
    base: Path, folder: Path, *, seed: int = 1, trained: bool = True, **settings: Any
) -> Path:
    """Save a LoRA adapter for `base` to `folder`: `settings` are LoraConfig's."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    if is_own(read_config(base / "config.json")):
        # Without it peft would write down the module of a class that is not transformers'.
        settings = {"task_type": "CAUSAL_LM"} | settings
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**settings))
        if trained:
            randomise(model, seed)
        model.save_pretrained(folder)
    return folder


def inputs_for(base: Path, seed: int = 7) -> dict[str, torch.Tensor]:
    """Random tokens around two image tiles of random pixels, for a folder of `write_tiny_model`."""
    import json

    config = json.loads((base / "config.json").read_text())
    vision, image = config["vision_config"], config["image_token_id"]
    side, vocabulary = vision["image_size"], config["text_config"]["vocab_size"]
    tokens = (side // vision["patch_size"] // config["scale_factor"]) ** 2
    random = np.random.default_rng(seed)
    ids = random.choice(np.setdiff1d(np.arange(vocabulary), [image]), 20)
    ids = np.concatenate([ids[:3], np.full(2 * tokens, image), ids[3:]])
    pixels = random.normal(size=(1, 2, 3, side, side)).astype(np.float32)
    return {"input_ids": torch.from_numpy(ids[None]), "pixel_values": torch.from_numpy(pixels)}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    """Logits ``[1, length, vocab]``."""
    with torch.inference_mode():
        found: NDArray[np.float32] = model(**inputs, use_cache=False).logits.numpy()
    return found


def distance(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
