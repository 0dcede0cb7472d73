"""Adapters made with peft on a tiny model that does not caption, with random weights for training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from exporter.core.modelfiles import read_config
from exporter.runtimes.torch_reference import load_model
from tests.support.adapters import randomise


def write_task_adapter(
    base: Path, folder: Path, targets: Sequence[str], *, seed: int = 1, **settings: Any
) -> Path:
    """Save a LoRA adapter of rank 4 and scaling 2 for the merged folder `base` to `folder`."""
    from peft import LoraConfig, get_peft_model

    model = load_model(base, read_config(base / "config.json"))
    if not type(model).__module__.startswith("transformers."):
        # Else peft writes where to import the class from, which is refused when it is ours.
        settings = {"task_type": "FEATURE_EXTRACTION"} | settings
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
        randomise(wrapped, seed)
        wrapped.save_pretrained(folder)
    return folder
