"""Small safetensors files and indexes for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from exporter.core.tensors import CODES, SafetensorsWriter

Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]
ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    entries = {n: (CODES[a.dtype.name], a.shape) for n, a in arrays.items()}
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return path


def shards(folder: Path, **parts: Arrays) -> dict[str, str]:
    """Write each keyword's arrays as a shard; returns the weight map."""
    for shard, arrays in parts.items():
        save_file(arrays, folder / f"{shard}.safetensors")
    return {name: f"{shard}.safetensors" for shard, arrays in parts.items() for name in arrays}


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
