"""Proves a merge of any size: each changed layer alone, merged by peft, against the merged file."""

from __future__ import annotations

from typing import Any, cast

import torch

from exporter.adapters.recipe import BiasUpdate, Recipe, Step
from exporter.adapters.rounding import rounding_steps
from exporter.adapters.targets import LoraUpdate, Replacement
from exporter.core.errors import ParityFailed
from exporter.core.tensors import Checkpoint


def prove_layers(recipe: Recipe, stored: Checkpoint) -> float:
    """Largest distance of the merged tensors from peft's merge, in float16 steps; one layer in memory.

    Raises `ParityFailed` when one is further off than rounding, or an untouched one was changed.
    """
    base = recipe.base
    worst = 0.0
    for name in sorted({*base.tensors.tensors, *recipe.steps}):
        source = base.source(name)
        if base.tensors.info(source).dtype not in ("F16", "BF16", "F32", "F64"):
            continue
        weight = torch.from_numpy(base.tensors.float32(source))
        for step in recipe.steps.get(name, ()):
            weight = _merged_by_peft(step, weight)
        merged = _stored(recipe, stored, name)
        worst = max(worst, rounding_steps(name, merged, weight))
    return worst


def _stored(recipe: Recipe, stored: Checkpoint, name: str) -> torch.Tensor:
    if name in stored:
        return torch.from_numpy(stored.float32(name))
    if recipe.base.tied and name == recipe.base.head:
        return torch.from_numpy(stored.float32(recipe.base.embedding))
    raise ParityFailed(f"merged model lacks '{name}'; merge it again")


def _merged_by_peft(step: Step, weight: torch.Tensor) -> torch.Tensor:
    action, tensors = step.action, step.adapter.tensors
    if isinstance(action, Replacement):
        return torch.from_numpy(tensors.float32(action.source))
    if isinstance(action, BiasUpdate):
        return weight + action.scaling * torch.from_numpy(tensors.float32(action.source))
    return _one_layer(step, action, weight)


def _one_layer(step: Step, update: LoraUpdate, weight: torch.Tensor) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = step.adapter.config
    holder = torch.nn.ModuleDict({"layer": _module(update, weight)})
    settings = LoraConfig(
        r=update.rank,
        lora_alpha=cast(Any, update.alpha),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=update.kind == "conv1d",
        target_modules=["layer"],
    )
    model: Any = get_peft_model(cast(Any, holder), settings)
    set_peft_model_state_dict(model, _state(step, update))
    merged: torch.Tensor = model.merge_and_unload()["layer"].weight
    return merged.detach()


def _module(update: LoraUpdate, weight: torch.Tensor) -> torch.nn.Module:
    shape = weight.shape
    module: torch.nn.Module
    if update.kind == "embedding":
        module = torch.nn.Embedding(*shape)
    elif update.kind == "convolution":
        module = torch.nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=False)
    elif update.kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(shape[1], shape[0])
    else:
        module = torch.nn.Linear(shape[1], shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight)
    return module.eval()


def _state(step: Step, update: LoraUpdate) -> dict[str, torch.Tensor]:
    stem = "base_model.model.layer."
    embedding = update.kind == "embedding"
    form = "lora_embedding_{}" if embedding else "lora_{}.weight"
    keys = {form.format("A"): update.a, form.format("B"): update.b}
    if update.magnitude:
        keys["lora_magnitude_vector"] = update.magnitude
    tensors = step.adapter.tensors
    return {stem + k: torch.from_numpy(tensors.float32(v)) for k, v in keys.items()}
