"""Writes an adapter again as the installed peft and transformers name things, and nothing more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from exporter.adapters.base import BaseModel
from exporter.adapters.keys import PEFT_PREFIX
from exporter.adapters.read import CONFIG, WEIGHTS, Adapter, AdapterConfig
from exporter.adapters.targets import AdapterPlan
from exporter.core.digest import canonical_json
from exporter.core.tensors import SafetensorsWriter


def current_keys(plan: AdapterPlan, base: BaseModel) -> dict[str, str]:
    """Current key (with prefix, without adapter name) to the adapter file's own key.

    Copies of base weights are left out: peft would write them over the base.
    """
    keys: dict[str, str] = {}
    for update in plan.updates:
        kind = "lora_embedding_" if update.kind == "embedding" else "lora_"
        ending = "" if update.kind == "embedding" else ".weight"
        stem = f"{PEFT_PREFIX}{update.module}"
        keys[f"{stem}.{kind}A{ending}"] = update.a
        keys[f"{stem}.{kind}B{ending}"] = update.b
        if update.magnitude:
            keys[f"{stem}.lora_magnitude_vector"] = update.magnitude
        if update.b_bias:
            keys[f"{stem}.lora_B.bias"] = update.b_bias
    modules = {update.module for update in plan.updates}
    for replacement in plan.replacements:
        name = base.layout.canonical(replacement.tensor)
        module, _, kind = name.rpartition(".")
        middle = ".base_layer" if module in modules else ""
        keys[f"{PEFT_PREFIX}{module}{middle}.{kind}"] = replacement.source
    return keys


def write_current(adapter: Adapter, plan: AdapterPlan, base: BaseModel, folder: Path) -> None:
    """Write `adapter` into `folder` in the current layout, with checked settings only.

    The targets are written out, so that peft matches no expression of unknown cost. rank_pattern and
    alpha_pattern stay the adapter's own when its names are current, so that peft reads them itself.
    """
    folder.mkdir(parents=True)
    keys = current_keys(plan, base)
    entries = {}
    for key, source in sorted(keys.items()):
        info = adapter.tensors.info(source)
        entries[key] = (info.dtype, info.shape)
    with SafetensorsWriter(folder / WEIGHTS, entries) as writer:
        for key in entries:
            writer.write(key, adapter.tensors.raw(keys[key]))
    settings: dict[str, Any] = msgspec.to_builtins(adapter.config)
    settings |= {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "ensure_weight_tying": False,
        "target_modules": [update.module for update in plan.updates],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _saved(adapter.config, plan, base),
    }
    if not set(keys.values()) <= set(keys):
        modules = {re.escape(update.module): update for update in plan.updates}
        settings["rank_pattern"] = {name: update.rank for name, update in modules.items()}
        settings["alpha_pattern"] = {name: update.alpha for name, update in modules.items()}
    (folder / CONFIG).write_bytes(canonical_json(settings))


def _saved(config: AdapterConfig, plan: AdapterPlan, base: BaseModel) -> list[str] | None:
    if not config.modules_to_save:
        return None
    names = {base.layout.canonical(name) for name in config.modules_to_save}
    tensors = {base.layout.canonical(replacement.tensor) for replacement in plan.replacements}
    for end in {base.layout.head, base.layout.embedding} & tensors:
        names.add(end.removesuffix(".weight"))
    return sorted(names)
