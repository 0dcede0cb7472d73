"""The base checkpoint as merging sees it: tensors under the newest names, and a head that may be tied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.adapters.keys import Layout, layout_of
from exporter.core.digest import sha256_file, sha256_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint

QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_format",
    ".qdata",
    ".weight_scale",
    ".weight_packed",
)


@dataclass(frozen=True)
class BaseModel:
    """An opened base.

    `names`: newest name to the checkpoint's own. `head`: the head's tensor name in the merged file,
    None for a model without one; while `tied`, its values are those of `embedding`.
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    tensors: Checkpoint
    names: dict[str, str]
    embedding: str
    head: str
    tied: bool

    def find(self, name: str) -> str | None:
        """The tensor's name in the merged file by its newest name; None when there is none."""
        if name in self.names:
            return self.names[name]
        return self.head if self.tied and name == self.layout.head else None

    def source(self, tensor: str) -> str:
        """The checkpoint's tensor that `tensor` starts from: itself, or the embedding for a tied head."""
        return tensor if tensor in self.tensors else self.embedding

    def digest(self) -> str:
        """SHA-256 over the digests of config.json and of every weight file."""
        files = {info.file for info in self.tensors.tensors.values()}
        files.add(self.folder / "config.json")
        return sha256_json({file.name: sha256_file(file) for file in files})


def open_base(folder: Path) -> BaseModel:
    """Open a float checkpoint of a known architecture. Raises `InputRefused`."""
    config = read_config(folder / "config.json")
    tensors = Checkpoint.open(folder)
    refuse_quantized(folder, config, tensors)
    layout = layout_of(config)
    names: dict[str, str] = {}
    for name in tensors.tensors:
        newest = layout.canonical(name)
        if newest in names:
            raise InputRefused(
                f"{folder}: '{name}' and '{names[newest]}' are the same tensor in two layouts; "
                "expected each once"
            )
        names[newest] = name
    if layout.embedding not in names:
        raise InputRefused(
            f"{folder}: no tensor '{layout.embedding}' among {len(names)}; expected a checkpoint of "
            f"{config.get('model_type')}"
        )
    embedding = names[layout.embedding]
    head = names.get(layout.head, layout.head)
    tied = _is_tied(folder, config, tensors, embedding, head)
    return BaseModel(folder, config, layout, tensors, names, embedding, head, tied)


def refuse_quantized(folder: Path, config: dict[str, Any], tensors: Checkpoint) -> None:
    """Raise `InputRefused` when the weights are quantized: an adapter merges in float or not at all."""
    found = None
    if config.get("quantization_config") is not None:
        found = "config.json has a quantization_config"
    elif (folder / "quantization.json").exists():
        found = "it has a quantization.json"
    else:
        for info in tensors.tensors.values():
            packed = info.dtype in ("U8", "I8") and len(info.shape) > 1
            if packed or info.name.endswith(QUANTIZED_SUFFIXES):
                found = f"tensor '{info.name}' is {info.dtype}"
                break
    if found:
        raise InputRefused(
            f"{folder}: the base is quantized ({found}); expected float weights: merge into the "
            "original checkpoint first, then quantize"
        )


def tie_flag(config: dict[str, Any]) -> bool | None:
    """tie_word_embeddings as config.json says it (its text part when the top says nothing)."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    flag = config.get("tie_word_embeddings", inner)
    return flag if isinstance(flag, bool) else None


def _is_tied(
    folder: Path, config: dict[str, Any], tensors: Checkpoint, embedding: str, head: str
) -> bool:
    flag = tie_flag(config)
    if head not in tensors:
        if flag is False:
            raise InputRefused(
                f"{folder}: no tensor '{head}', and config.json says that the head is not tied; "
                "download the checkpoint again"
            )
        return True
    # As transformers 5: a stored head that differs from the embedding is not tied, whatever the flag.
    return flag is True and np.array_equal(tensors.raw(embedding), tensors.raw(head))
