"""The float tensors of a model folder, dequantized where it is a quantized one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, Nf4Matrix, dequantize_nf4, nf4_shapes
from exporter.core.static8 import (
    CODES,
    INPUT_SCALE,
    INPUT_ZERO,
    ROW_SCALES,
    STATIC_CODE,
    StaticMatrix,
    dequantize_static,
    static_shapes,
)
from exporter.core.tensors import FLOATS, Checkpoint
from exporter.families.base import BUFFERS

QUANTIZATION = "quantization.json"
# What stands beside the codes of a matrix.
REST = (SCALES, ZEROS, NF4_SCALES, ROW_SCALES, INPUT_SCALE, INPUT_ZERO)


def float_tensors(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 array) for each weight of a float or quantized model folder.

    Raises `InputRefused` when quantization.json and the tensors disagree.
    """
    checkpoint = Checkpoint.open(folder)
    layers = _layers(folder)
    for name in checkpoint.tensors:
        base, dot, suffix = name.rpartition(".")
        if dot + suffix == QDATA:
            if base not in layers:
                raise InputRefused(f"{folder}: '{base}' is quantized and not in {QUANTIZATION}")
            found = dequantize(packed_matrix(checkpoint, base, layers[base]))
            yield base, _as_stored(found, layers[base])
        elif dot + suffix == NF4_DATA:
            layer = layers.get(base, {})
            yield base, _as_stored(dequantize_nf4(nf4_matrix(checkpoint, base, layer)), layer)
        elif dot + suffix == CODES:
            row = layers.get(base, {})
            yield base, _as_stored(dequantize_static(static_matrix(checkpoint, base, row)), row)
        elif (dot + suffix in REST and base in layers) or BUFFERS.search(name):
            continue
        elif checkpoint.info(name).dtype in FLOATS:  # others: buffers that older transformers saved
            yield name, checkpoint.float32(name)


def _as_stored(matrix: NDArray[np.float32], layer: Mapping[str, Any]) -> NDArray[np.float32]:
    """A matrix ``[outputs, inputs]`` as the checkpoint has it, which may be turned (Conv1D)."""
    return np.ascontiguousarray(matrix.T) if layer.get("turned") else matrix


def packed_matrix(checkpoint: Checkpoint, name: str, layer: dict[str, Any]) -> PackedMatrix:
    """The stored matrix `name`; `layer` is its entry in quantization.json.

    Raises `InputRefused` when the stored shapes are not what the entry says.
    """
    try:
        form = BlockFormat(int(layer["bits"]), int(layer["block"]), bool(layer["symmetric"]))
        rows, columns = int(layer["rows"]), int(layer["columns"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{QUANTIZATION}: bad entry for '{name}' ({error!r})") from error
    if form.bits not in (4, 8) or form.block < 1:
        raise InputRefused(
            f"{QUANTIZATION}: '{name}' has {form.bits} bits in blocks of {form.block}"
        )
    blocks = -(-columns // form.block)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        QDATA: ("U8", (rows, blocks, form.block * form.bits // 8)),
        SCALES: ("F16", (rows, blocks)),
    }
    if not form.symmetric:
        expected[ZEROS] = ("U8", (rows, -(-blocks * form.bits // 8)))
    for suffix, (dtype, shape) in expected.items():
        info = checkpoint.info(name + suffix)
        if (info.dtype, info.shape) != (dtype, shape):
            raise InputRefused(
                f"tensor '{name}{suffix}' is {info.dtype} {list(info.shape)}, {QUANTIZATION} says "
                f"{dtype} {list(shape)}"
            )
    zeros = None if form.symmetric else checkpoint.raw(name + ZEROS)
    return PackedMatrix(
        form, columns, checkpoint.raw(name + QDATA), checkpoint.raw(name + SCALES), zeros
    )


def nf4_matrix(checkpoint: Checkpoint, name: str, layer: dict[str, Any]) -> Nf4Matrix:
    """The NF4 matrix `name`; `layer` is its entry in quantization.json. Raises `InputRefused`."""
    sizes = [layer.get(key) for key in ("rows", "columns", "block")]
    if layer.get("code") != "nf4" or not all(type(s) is int and s > 0 for s in sizes):
        raise InputRefused(f"{QUANTIZATION}: no entry for the NF4 matrix '{name}' with its sizes")
    rows, columns, block = (int(layer[key]) for key in ("rows", "columns", "block"))
    size, maxima = nf4_shapes(rows, columns, block)
    for suffix, dtype, count in ((NF4_DATA, "U8", size), (NF4_SCALES, "F32", maxima)):
        info = checkpoint.info(name + suffix)
        if (info.dtype, info.shape) != (dtype, (count,)):
            raise InputRefused(
                f"tensor '{name}{suffix}' is {info.dtype} {list(info.shape)}, {QUANTIZATION} says "
                f"{dtype} [{count}]"
            )
    data, absmax = checkpoint.raw(name + NF4_DATA), checkpoint.raw(name + NF4_SCALES)
    return Nf4Matrix(rows, columns, block, data, absmax)


def static_matrix(checkpoint: Checkpoint, name: str, layer: dict[str, Any]) -> StaticMatrix:
    """The statically quantized matrix `name`; `layer` is its entry in quantization.json.

    Raises `InputRefused` when the stored shapes are not what the entry says.
    """
    sizes = [layer.get(key) for key in ("rows", "columns")]
    if layer.get("code") != STATIC_CODE or not all(type(s) is int and s > 0 for s in sizes):
        raise InputRefused(f"{QUANTIZATION}: no entry for the 8-bit matrix '{name}' with its sizes")
    rows, columns = int(layer["rows"]), int(layer["columns"])
    for suffix, (dtype, shape) in static_shapes(rows, columns).items():
        info = checkpoint.info(name + suffix)
        if (info.dtype, info.shape) != (dtype, shape):
            raise InputRefused(
                f"tensor '{name}{suffix}' is {info.dtype} {list(info.shape)}, {QUANTIZATION} says "
                f"{dtype} {list(shape)}"
            )
    codes, scales = checkpoint.raw(name + CODES), checkpoint.raw(name + ROW_SCALES)
    scale = float(checkpoint.raw(name + INPUT_SCALE)[0])
    return StaticMatrix(codes, scales, scale, int(checkpoint.raw(name + INPUT_ZERO)[0]))


def _layers(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / QUANTIZATION
    if not path.is_file():
        return {}
    layers = read_json(path).get("layers")
    if not isinstance(layers, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in layers
    ):
        raise InputRefused(f"{path}: layers is not a list of named entries")
    return {entry["name"]: entry for entry in layers if entry.get("kind") != "float"}
