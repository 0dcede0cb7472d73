"""The base checkpoint as merging sees it: tensors under the newest names, and a head that may be tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.digest import sha256_file, sha256_json
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS
from exporter.families.checkpoints import (
    folder_config,
    joined_tensors,
    layout_of,
    left_out_tensors,
    published_config,
)
from exporter.families.config import tied_section
from exporter.families.layouts.names import Layout

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
    """An opened base, its tensors under the newest names whatever layout they are stored in.

    `config` is as the newest class reads it. `head`: the head's name in the merged file, whether the
    base stores one or not, empty where the architecture has none; while `tied`, its values are those
    of `embedding`. `left_out`: tensors that the merged file does not get, and why.
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    tensors: Checkpoint
    embedding: str
    head: str
    tied: bool
    left_out: Mapping[str, str]

    def find(self, name: str) -> str | None:
        """`name` when the merged file has a tensor of that name, None when it has none."""
        return name if name in self.tensors or (self.tied and name == self.head) else None

    def source(self, tensor: str) -> str:
        """The checkpoint's tensor that `tensor` starts from: itself, or the embedding for a tied head."""
        return tensor if tensor in self.tensors else self.embedding

    def digest(self) -> str:
        """SHA-256 over the digests of config.json and of every weight file."""
        files = {info.file for info in self.tensors.tensors.values()}
        files.add(self.folder / "config.json")
        return sha256_json({file.name: sha256_file(file) for file in files})


def open_newest(folder: Path) -> Checkpoint:
    """The tensors of a published folder under the names that merging gives them.

    Raises `InputRefused` for an unknown architecture, and as `Checkpoint.open` does.
    """
    config = published_config(folder)
    layout = layout_of(config)
    return joined_tensors(config, Checkpoint.open(folder).renamed(layout.canonical))


def open_base(folder: Path) -> BaseModel:
    """Open a float checkpoint of a known architecture. Raises `InputRefused`."""
    published, config = published_config(folder), folder_config(folder)
    stored = Checkpoint.open(folder)
    refuse_quantized(folder, config, stored)
    layout = layout_of(published)
    renamed = stored.renamed(layout.canonical)
    tensors, left_out = joined_tensors(published, renamed), left_out_tensors(published, renamed)
    embedding, head = layout.embedding, layout.head
    if embedding not in tensors:
        raise InputRefused(
            f"{folder}: no tensor '{embedding}' among {len(tensors.tensors)}; expected a checkpoint of "
            f"{config.get('model_type')}"
        )
    tied = _is_tied(folder, config, tensors, embedding, head)
    return BaseModel(folder, config, layout, tensors, embedding, head, tied, left_out)


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
            if BUFFERS.search(info.name):
                continue
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
    flag = tied_section(config).get("tie_word_embeddings", inner)
    return flag if isinstance(flag, bool) else None


def _is_tied(
    folder: Path, config: dict[str, Any], tensors: Checkpoint, embedding: str, head: str
) -> bool:
    if not head:
        return False
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
