"""bitsandbytes' storage of linear layers: nf4 and int8, and checkpoints that it reads.

nf4: Dettmers et al., QLoRA, arXiv 2305.14314 (no double quantization: the maxima stay float32).
int8: Dettmers et al., LLM.int8(), arXiv 2208.07339, its weights: one absmax per row of 127 steps.
Its split of outlier inputs is a matter of the kernel and not of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.nf4 import (
    NF4_BLOCK,
    NF4_DATA,
    NF4_SCALES,
    Nf4Matrix,
    dequantize_nf4,
    nf4_shapes,
    quantize_nf4,
)
from exporter.core.progress import Progress, silent
from exporter.core.tensors import FLOATS, Checkpoint
from exporter.families.table import family_of
from exporter.formats.folder import REPORT, Entry, FloatEntry, Imported, PackedEntry, write_folder

Kind = Literal["nf4", "int8"]
STEPS = 127
# Blocks along the columns only repeat a row's scale; the largest that divides costs the fewest bytes.
INT8_BLOCKS = (256, 128, 64, 32, 16)
REST = "bitsandbytes quantizes the linear layers of the blocks and the projection only"


@dataclass(frozen=True)
class Nf4Entry:
    """A linear layer that will be stored in NF4."""

    name: str
    rows: int
    columns: int
    read: Callable[[], Nf4Matrix]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors: name to (dtype, shape)."""
        size, maxima = nf4_shapes(self.rows, self.columns, NF4_BLOCK)
        return {self.name + NF4_DATA: ("U8", (size,)), self.name + NF4_SCALES: ("F32", (maxima,))}

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The same with their values."""
        matrix = self.read()
        yield self.name + NF4_DATA, matrix.data
        yield self.name + NF4_SCALES, matrix.absmax

    def row(self) -> dict[str, Any]:
        """Its row of quantization.json."""
        return {
            "name": self.name,
            "kind": "linear",
            "code": "nf4",
            "bits": 4,
            "block": NF4_BLOCK,
            "symmetric": True,
            "columns": self.columns,
            "rows": self.rows,
        }


def quantize_bnb(source: Path, out: Path, kind: Kind, *, progress: Progress = silent) -> Imported:
    """Quantize the float model folder `source` into the empty folder `out` as bitsandbytes does.

    The linear layers of all blocks and the projection; head, embeddings, norms and biases stay
    float16, with the reason. Codes equal bitsandbytes' own; int8 scales are rounded to float16.
    Raises `InputRefused` for a folder that is quantized, of no known family, or holds NaN.
    """
    if (source / REPORT).exists():
        raise InputRefused(f"{source}: already quantized ({REPORT}); expected a float model")
    config = read_config(source / "config.json")
    if "quantization_config" in config:
        raise InputRefused(
            f"{source}: config.json has a quantization_config; expected a float model"
        )
    checkpoint = Checkpoint.open(source)
    errors: dict[str, float] = {}
    chosen = _linear_names(checkpoint, config)
    make = _nf4_entry if kind == "nf4" else _int8_entry
    entries: list[Entry] = []
    for name, info in checkpoint.tensors.items():
        entry = make(checkpoint, name, errors) if name in chosen else None
        reason = (
            f"[{', '.join(map(str, info.shape))}] makes no whole blocks" if name in chosen else REST
        )
        entries.append(
            entry or FloatEntry(name, info.shape, reason, partial(checkpoint.float32, name))
        )
    found = Imported(f"bnb-{kind}", f"bnb-{kind}", entries, config=config, errors=errors)
    return write_folder(source, out, found, progress=progress)


def int8_rows(weight: NDArray[np.float32], block: int, name: str = "matrix") -> PackedMatrix:
    """LLM.int8()'s codes ``rint(w * 127 / absmax of the row)`` of ``[N, K]``, K in whole blocks.

    The row's scale, absmax / 127 rounded to float16, is repeated for each block. Raises
    `InputRefused` naming `name` when a value is not finite or needs a scale beyond float16.
    """
    rows, columns = weight.shape
    absmax = np.abs(weight).max(axis=1, initial=0.0)
    with np.errstate(over="ignore"):
        scales = (absmax / np.float32(STEPS)).astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputRefused(f"tensor '{name}' holds {absmax.max()}; expected finite values in range")
    inverse = np.divide(np.float32(STEPS), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = (np.rint(weight * inverse[:, None]) + np.float32(128)).astype(np.uint8)
    return PackedMatrix(
        BlockFormat(8, block, symmetric=True),
        columns,
        codes.reshape(rows, -1, block),
        np.repeat(scales[:, None], columns // block, axis=1),
        None,
    )


def _nf4_entry(checkpoint: Checkpoint, name: str, errors: dict[str, float]) -> Entry | None:
    rows, columns = checkpoint.info(name).shape
    # The graphs stack matrices (q, k, v): only whole blocks keep their values then.
    if rows * columns % NF4_BLOCK:
        return None

    def read() -> Nf4Matrix:
        weight = checkpoint.float32(name)
        try:
            matrix = quantize_nf4(weight)
        except ValueError as error:
            raise InputRefused(f"tensor '{name}': {error}; repair the checkpoint") from error
        errors[name] = _relative(weight, dequantize_nf4(matrix))
        return matrix

    return Nf4Entry(name, rows, columns, read)


def _int8_entry(checkpoint: Checkpoint, name: str, errors: dict[str, float]) -> Entry | None:
    rows, columns = checkpoint.info(name).shape
    block = next((b for b in INT8_BLOCKS if columns % b == 0), None)
    if block is None:
        return None

    def read() -> PackedMatrix:
        weight = checkpoint.float32(name)
        packed = int8_rows(weight, block, name)
        errors[name] = _relative(weight, dequantize(packed))
        return packed

    form = BlockFormat(8, block, symmetric=True)
    return PackedEntry(name, "linear", rows, columns, form, read)


def _linear_names(checkpoint: Checkpoint, config: dict[str, Any]) -> set[str]:
    family = family_of(config)
    decoder, tower = family.decoder_spec(config), family.tower_spec(config)
    names = {
        tensor.name
        for tensor in (*decoder.tensors(), *tower.tensors())
        if tensor.role in ("decoder", "vision")
    }
    for name in sorted(names):
        info = checkpoint.info(name)
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise InputRefused(
                f"{info.file}: '{name}' is {info.dtype} {list(info.shape)}; expected a float matrix"
            )
    return names


def _relative(weight: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - found)) / norm if norm else 0.0
