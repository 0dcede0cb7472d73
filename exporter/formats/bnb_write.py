"""Writes an NF4 folder as a checkpoint that transformers loads with bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.artifact import need_space
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import copy_small_files, read_json
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, NF4_VALUES, nf4_shapes
from exporter.core.progress import Progress, silent
from exporter.core.tensors import ITEM_BYTES, Checkpoint, SafetensorsWriter
from exporter.families.checkpoints import published_config
from exporter.families.specs.llama import NO_FORMAT, require_llama
from exporter.families.table import family_of
from exporter.formats.folder import REPORT, as_float16
from exporter.formats.settings import KEY
from exporter.runtimes.weights import nf4_matrix

STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class BnbWritten:
    """Names of the matrices written in NF4, and of the modules that stay in float16."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]


def write_bnb(source: Path, out: Path, *, progress: Progress = silent) -> BnbWritten:
    """Write the NF4 folder `source` (scheme `bnb-nf4`) into the empty folder `out`.

    The bytes of codes and maxima are taken over. Raises `InputRefused` when a matrix of `source` is
    stored in another form, which bitsandbytes cannot hold.
    """
    layers = _layers(source)
    checkpoint = Checkpoint.open(source)
    entries = _entries(checkpoint, layers)
    need_space(out, sum(ITEM_BYTES[d] * int(np.prod(s)) for d, s in entries.values()) + (64 << 20))
    copy_small_files(source, out)
    config = published_config(source)
    decoder = require_llama(
        family_of(config).decoder_spec(config), "writing bitsandbytes", instead=NO_FORMAT
    )
    head = decoder.head.removesuffix(".weight")
    (out / "config.json").write_bytes(canonical_json({**config, KEY: _settings(head)}))
    with SafetensorsWriter(out / "model.safetensors", entries, {"format": "pt"}) as file:
        for done, (name, array) in enumerate(_arrays(checkpoint, layers), 1):
            file.write(name, array)
            progress(done, len(entries), name)
    return BnbWritten(tuple(layers), (head,))


def _settings(head: str) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [head],
    }


def _layers(source: Path) -> dict[str, dict[str, Any]]:
    path = source / REPORT
    layers = read_json(path).get("layers") if path.is_file() else None
    if not isinstance(layers, list) or not layers or not all(isinstance(e, dict) for e in layers):
        raise InputRefused(f"{source}: no quantized layers in {REPORT}; expected a bnb-nf4 folder")
    for entry in layers:
        if entry.get("code") != "nf4":
            raise InputRefused(
                f"{path}: '{entry.get('name')}' is stored in {entry.get('bits')} bits as integers; "
                "bitsandbytes holds NF4; quantize as bnb-nf4"
            )
    return {str(entry["name"]): entry for entry in layers}


def _state(layer: dict[str, Any]) -> NDArray[np.uint8]:
    """The JSON text that bitsandbytes keeps beside the codes, as bytes."""
    text = canonical_json(
        {
            "quant_type": "nf4",
            "blocksize": layer["block"],
            "dtype": "float16",
            "shape": [layer["rows"], layer["columns"]],
        }
    )
    return np.frombuffer(text, np.uint8)


def _entries(
    checkpoint: Checkpoint, layers: dict[str, dict[str, Any]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layer in _names(checkpoint, layers):
        if layer is None:
            found[name] = ("F16", checkpoint.info(name).shape)
            continue
        matrix = nf4_matrix(checkpoint, name, layer)
        size, maxima = nf4_shapes(matrix.rows, matrix.columns, matrix.block)
        found[name] = ("U8", (size, 1))
        found[f"{name}.absmax"] = ("F32", (maxima,))
        found[f"{name}.quant_map"] = ("F32", NF4_VALUES.shape)
        found[f"{name}{STATE}"] = ("U8", _state(layer).shape)
    return found


def _arrays(
    checkpoint: Checkpoint, layers: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, layer in _names(checkpoint, layers):
        if layer is None:
            yield name, as_float16(name, checkpoint.float32(name))
            continue
        matrix = nf4_matrix(checkpoint, name, layer)
        yield name, matrix.data[:, None]
        yield f"{name}.absmax", matrix.absmax
        yield f"{name}.quant_map", NF4_VALUES
        yield f"{name}{STATE}", _state(layer)


def _names(
    checkpoint: Checkpoint, layers: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for name in checkpoint.tensors:
        base, dot, part = name.rpartition(".")
        if base not in layers:
            yield name, None
        elif dot + part == NF4_DATA:
            yield base, layers[base]
        elif dot + part != NF4_SCALES:
            raise InputRefused(f"'{name}' belongs to no part of an NF4 matrix")
