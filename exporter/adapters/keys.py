"""What an adapter's keys mean: the module, by its newest name, and the part of the update."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from exporter.core.errors import InputRefused
from exporter.families.layouts.names import Layout

PEFT_PREFIX = "base_model.model."

Part = Literal[
    "lora_A",
    "lora_B",
    "lora_B_bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base",
    "whole",
]


@dataclass(frozen=True)
class AdapterKey:
    """One adapter tensor: the module it belongs to (newest layout) and its part in it.

    For `whole` (a tensor that replaces one of the base) and `base` (peft's copy of a base weight)
    `module` is the tensor's whole name.
    """

    key: str
    module: str
    part: Part
    adapter: str | None


FORMS: tuple[tuple[re.Pattern[str], Part | None], ...] = (
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_[AB])(\.(?P<a>[^.]+))?\.weight"), None),
    (re.compile(r"(?P<m>.+)\.lora_B(\.(?P<a>[^.]+))?\.bias"), "lora_B_bias"),
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_embedding_[AB])(\.(?P<a>[^.]+))?"), None),
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_magnitude_vector)(\.(?P<a>[^.]+?))??(\.weight)?"), None),
    (re.compile(r"(?P<m>.+)\.base_layer\.weight"), "base"),
    (re.compile(r"(?P<m>.+)\.base_layer\.bias"), "whole"),
    (re.compile(r"(?P<m>.+)\.modules_to_save(\.(?P<a>[^.]+))?\.(?P<t>weight|bias)"), "whole"),
    (re.compile(r"(?P<m>.+)"), "whole"),
)


def parse_key(key: str, layout: Layout) -> AdapterKey:
    """Take one key of adapter_model.safetensors apart (with or without prefix and adapter name)."""
    name = key.removeprefix(PEFT_PREFIX)
    for form, part in FORMS:
        if found := form.fullmatch(name):
            groups = found.groupdict()
            module = groups["m"]
            if part == "base":
                module += ".weight"
            elif "base_layer" in form.pattern:
                module += ".bias"
            elif groups.get("t"):
                module += f".{groups['t']}"
            return AdapterKey(
                key, layout.canonical(module), part or _part(groups["p"]), groups.get("a")
            )
    raise InputRefused(f"adapter key {key!r} is empty; expected a module's name")


def _part(text: str) -> Part:
    parts: dict[str, Part] = {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    return parts[text]
