"""A quantized folder made with a few lines of numpy: plain rounding, no search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat, PackedMatrix, dequantize
from exporter.core.modelfiles import copy_small_files
from exporter.core.tensors import Checkpoint


def pack(weight: np.ndarray, form: BlockFormat) -> PackedMatrix:
    """Round each block of `weight` [N, K] to its own grid."""
    rows, columns = weight.shape
    blocks = -(-columns // form.block)
    padded = np.zeros((rows, blocks * form.block), np.float32)
    padded[:, :columns] = weight
    padded = padded.reshape(rows, blocks, form.block)
    low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    if form.symmetric:
        scales = np.maximum(high, -low) / (form.middle - 1)
        zeros = np.full(scales.shape, form.middle, np.float32)
    else:
        scales = (high - low) / form.top
        zeros = np.rint(-low / scales)
    scales = scales.astype(np.float16)
    values = np.rint(padded / scales.astype(np.float32)[..., None]) + zeros[..., None]
    values = np.clip(values, 0, form.top).astype(np.uint8)
    stored = None if form.symmetric else nibbles(zeros.astype(np.uint8), form.bits)
    return PackedMatrix(form, columns, nibbles(values, form.bits), scales, stored)


def nibbles(values: np.ndarray, bits: int) -> np.ndarray:
    """Two 4-bit values to a byte, the first one low."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate((values, np.zeros((*values.shape[:-1], 1), np.uint8)), -1)
    return values[..., ::2] | values[..., 1::2] << 4


def quantize_folder(
    source: Path, out: Path, formats: Mapping[str, BlockFormat]
) -> dict[str, np.ndarray]:
    """Write `source` with the tensors of `formats` packed and the others as float16.

    Returns the weights that the folder stands for, as float32.
    """
    out.mkdir()
    copy_small_files(source, out)
    checkpoint = Checkpoint.open(source)
    tensors: dict[str, np.ndarray] = {}
    meaning: dict[str, np.ndarray] = {}
    layers = []
    for name in checkpoint.tensors:
        weight = checkpoint.float32(name)
        if name not in formats:
            tensors[name] = weight.astype(np.float16)
            meaning[name] = tensors[name].astype(np.float32)
            continue
        form = formats[name]
        packed = pack(weight, form)
        tensors[name + QDATA], tensors[name + SCALES] = packed.qdata, packed.scales
        if packed.zero_points is not None:
            tensors[name + ZEROS] = packed.zero_points
        meaning[name] = dequantize(packed)
        layers.append(
            {
                "name": name,
                "kind": "linear",
                "bits": form.bits,
                "block": form.block,
                "symmetric": form.symmetric,
                "rows": weight.shape[0],
                "columns": weight.shape[1],
            }
        )
    save_file(tensors, out / "model.safetensors")
    (out / "quantization.json").write_text(json.dumps({"schema": 1, "layers": layers}))
    return meaning
