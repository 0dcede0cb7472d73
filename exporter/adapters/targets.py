"""Finds for each adapter key the base tensor it changes, and refuses an adapter that does not fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.adapters.base import BaseModel
from exporter.adapters.keys import AdapterKey, Part, parse_key
from exporter.adapters.patterns import inside, layer_index, look_up, named
from exporter.adapters.read import Adapter, AdapterConfig
from exporter.core.errors import InputRefused

Kind = Literal["linear", "conv1d", "embedding", "convolution"]


@dataclass(frozen=True)
class LoraUpdate:
    """A low-rank change of one weight: ``W += scaling * B A`` (then DoRA's rescaling).

    `module`: newest name; `tensor`: the weight's name in the merged file; `a`, `b`, `magnitude`,
    `b_bias`: keys of the adapter file; `kind` says how B A is laid out in W.
    """

    module: str
    tensor: str
    kind: Kind
    a: str
    b: str
    magnitude: str | None
    b_bias: str | None
    bias: str | None
    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class Replacement:
    """A tensor of the adapter (`source`) that takes the place of the base's `tensor`."""

    tensor: str
    source: str


@dataclass(frozen=True)
class BaseCopy:
    """The adapter's own copy (`source`) of the base weight `tensor`: it tells whether the base is the same."""

    tensor: str
    source: str


@dataclass(frozen=True)
class AdapterPlan:
    """What one adapter does to the base."""

    updates: tuple[LoraUpdate, ...]
    replacements: tuple[Replacement, ...]
    copies: tuple[BaseCopy, ...]


def plan_adapter(adapter: Adapter, base: BaseModel) -> AdapterPlan:
    """Resolve every key of `adapter` against the base's tensors.

    Raises `InputRefused` when a key fits nothing, half of a pair is missing, a shape or a rank is
    not what the base or adapter_config.json says, or a target of target_modules is missing.
    """
    keys = [parse_key(key, base.layout) for key in adapter.tensors.tensors]
    adapters = sorted({key.adapter for key in keys if key.adapter})
    if len(adapters) > 1:
        raise InputRefused(
            f"{adapter.folder}: tensors of several adapters in one file ({', '.join(adapters)}); "
            "save each into a folder of its own"
        )
    parts: dict[str, dict[Part, AdapterKey]] = defaultdict(dict)
    replacements: list[Replacement] = []
    copies: list[BaseCopy] = []
    for key in keys:
        if key.part == "whole":
            replacements.append(_replacement(adapter, base, key))
        elif key.part == "base":
            copies.append(BaseCopy(_tensor(adapter, base, key, key.module), key.key))
        elif key.part in parts[key.module]:
            other = parts[key.module][key.part].key
            raise InputRefused(
                f"{adapter.folder}: '{key.key}' and '{other}' are the same tensor; save it again"
            )
        else:
            parts[key.module][key.part] = key
    updates = tuple(_update(adapter, base, module, found) for module, found in parts.items())
    _refuse_missing(adapter, base, {u.module for u in updates})
    for replacement in replacements:
        _same_shape(adapter, base, replacement.tensor, replacement.source)
    for copy in copies:
        _same_shape(adapter, base, copy.tensor, copy.source)
    return AdapterPlan(updates, tuple(replacements), tuple(copies))


def _tensor(adapter: Adapter, base: BaseModel, key: AdapterKey, name: str) -> str:
    tensor = base.find(name)
    if tensor is None:
        raise InputRefused(
            f"{adapter.folder}: '{key.key}' changes '{name}', which the base ({base.folder.name}, "
            f"{len(base.tensors.tensors)} tensors, e.g. '{base.embedding}') does not have; "
            "is it an adapter for another base?"
        )
    return tensor


def _replacement(adapter: Adapter, base: BaseModel, key: AdapterKey) -> Replacement:
    config, name = adapter.config, key.module
    module = name.rpartition(".")[0]
    # ensure_weight_tying saves both ends of the tie, modules_to_save names one.
    ends = (base.layout.head, base.layout.embedding)
    allowed = (
        (config.ensure_weight_tying and name in ends)
        or inside(module, config.modules_to_save or ())
        or (
            name.endswith(".bias")
            and (config.bias == "all" or (config.bias == "lora_only" and ".base_layer." in key.key))
        )
    )
    if not allowed:
        raise InputRefused(
            f"{adapter.folder}: unexpected key '{key.key}': neither LoRA, nor in modules_to_save "
            f"({config.modules_to_save}), nor a bias that bias='{config.bias}' saves; is the "
            "adapter_config.json of another adapter?"
        )
    return Replacement(_tensor(adapter, base, key, name), key.key)


def _update(
    adapter: Adapter, base: BaseModel, module: str, parts: dict[Part, AdapterKey]
) -> LoraUpdate:
    config = adapter.config
    first = next(iter(parts.values()))
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names: tuple[Part, Part] = (
        ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    )
    needed = {*names, "lora_magnitude_vector"} if config.use_dora else {*names}
    optional = {"lora_B_bias"} if config.lora_bias else set()
    if missing := sorted(needed - parts.keys()):
        raise InputRefused(
            f"{adapter.folder}: '{module}' has {sorted(parts)} but no {', '.join(missing)}; expected "
            f"{sorted(needed)}: the file is incomplete, save the adapter again"
        )
    if extra := sorted(parts.keys() - needed - optional):
        raise InputRefused(
            f"{adapter.folder}: '{module}' has an unexpected {', '.join(extra)} (use_dora is "
            f"{config.use_dora}, lora_bias is {config.lora_bias}); is adapter_config.json another's?"
        )
    tensor = _tensor(adapter, base, first, f"{module}.weight")
    a, b = parts[names[0]].key, parts[names[1]].key
    kind, rank = _fit(adapter, base, module, tensor, a, b, embedding)
    old = adapter_module(first)
    alpha = look_up(config.alpha_pattern, old, float(config.lora_alpha))
    if rank != look_up(config.rank_pattern, old, config.r):
        raise InputRefused(
            f"{adapter.folder}: '{module}' has rank {rank}, adapter_config.json says "
            f"{look_up(config.rank_pattern, old, config.r)}; is it the config of another adapter?"
        )
    magnitude = parts.get("lora_magnitude_vector")
    b_bias = parts.get("lora_B_bias")
    return LoraUpdate(
        module,
        tensor,
        kind,
        a,
        b,
        magnitude.key if magnitude else None,
        b_bias.key if b_bias else None,
        _tensor(adapter, base, b_bias, f"{module}.bias") if b_bias else None,
        rank,
        alpha,
        config.scaling(alpha, rank),
    )


def adapter_module(key: AdapterKey) -> str:
    """The module's path as the adapter spells it: peft matches its patterns against this form."""
    name = key.key.removeprefix("base_model.model.")
    return re.split(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.|$)", name)[0]


def _fit(
    adapter: Adapter, base: BaseModel, module: str, tensor: str, a: str, b: str, embedding: bool
) -> tuple[Kind, int]:
    """Layout and rank of a pair whose shapes fit the base's weight; `InputRefused` when they do not."""
    weight = base.tensors.info(base.source(tensor)).shape
    left, right = adapter.tensors.info(b).shape, adapter.tensors.info(a).shape
    kind: Kind = "linear"
    expected: tuple[tuple[int, ...], ...] = ()
    rank = right[0] if right else 0
    conv1d = adapter.config.fan_in_fan_out and named(module, base.layout.conv1d)
    if embedding and len(weight) == 2:
        kind, expected = "embedding", ((rank, weight[0]), (weight[1], rank))
    elif conv1d and len(weight) == 2:
        kind, expected = "conv1d", ((rank, weight[0]), (weight[1], rank))
    elif len(weight) == 2:
        expected = ((rank, weight[1]), (weight[0], rank))
    elif len(weight) == 4:
        kind, expected = "convolution", ((rank, *weight[1:]), (weight[0], rank, 1, 1))
    if rank < 1 or (right, left) != expected:
        raise InputRefused(
            f"{adapter.folder}: '{module}' has A {list(right)} and B {list(left)}, the base's weight is "
            f"{list(weight)}, which do not fit; is it an adapter for another base?"
        )
    return kind, rank


def _same_shape(adapter: Adapter, base: BaseModel, tensor: str, source: str) -> None:
    have = adapter.tensors.info(source).shape
    want = base.tensors.info(base.source(tensor)).shape
    if have != want:
        raise InputRefused(
            f"{adapter.folder}: '{source}' is {list(have)}, the base's '{tensor}' is {list(want)}; is "
            "it an adapter for another base, or was the vocabulary resized?"
        )


def _refuse_missing(adapter: Adapter, base: BaseModel, updated: set[str]) -> None:
    """Each weight that target_modules names must have its pair: a truncated adapter is refused."""
    targets = adapter.config.target_modules
    if not updated and targets:
        raise InputRefused(f"{adapter.folder}: no LoRA tensors; expected some for {targets!s:.100}")
    if targets is None or isinstance(targets, str):
        # A regular expression is matched against the whole old path, which the base may not have.
        return
    wanted = [base.layout.canonical(target) for target in targets]
    expected = [
        module
        for module in _modules(base)
        if named(module, (*targets, *wanted)) and not _excluded(adapter.config, module)
    ]
    missing = sorted(set(expected) - updated)
    if missing:
        raise InputRefused(
            f"{adapter.folder}: {len(missing)} of {len(expected)} targets have no LoRA tensors, first "
            f"'{missing[0]}'; is the file incomplete, or an adapter for another base?"
        )


def _modules(base: BaseModel) -> Sequence[str]:
    """Modules that peft can put LoRA on: those with a weight of two or more axes."""
    return [
        name.removesuffix(".weight")
        for name, info in base.tensors.tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1
    ]


def _excluded(config: AdapterConfig, module: str) -> bool:
    if inside(module, config.modules_to_save or ()):
        return True
    exclude = config.exclude_modules or ()
    if isinstance(exclude, str):
        if re.fullmatch(exclude, module):
            return True
    elif named(module, exclude):
        return True
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return False
    chosen = {layers} if isinstance(layers, int) else set(layers)
    patterns = config.layers_pattern or ()
    index = layer_index(module, [patterns] if isinstance(patterns, str) else patterns)
    return index not in chosen
