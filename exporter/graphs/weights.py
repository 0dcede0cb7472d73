"""Hands each tensor of a model folder to the graphs once, as float or as packed blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat, PackedMatrix
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, Nf4Matrix, nf4_shapes
from exporter.core.progress import Progress, silent
from exporter.core.static8 import (
    CODES,
    INPUT_SCALE,
    INPUT_ZERO,
    ROW_SCALES,
    STATIC_CODE,
    StaticMatrix,
)
from exporter.core.tensors import FLOATS, Checkpoint, to_float32
from exporter.families.base import BUFFERS, TensorSpec
from exporter.graphs.matrices import FloatArray, Matrix

FloatStorage = Literal["float16", "float32"]

QUANTIZATION = "quantization.json"


class WeightSource:
    """The tensors of a merged or quantized folder; remembers which were taken.

    `storage` is the dtype in which float matrices are kept in the graphs.
    """

    def __init__(self, folder: Path, storage: FloatStorage, progress: Progress = silent) -> None:
        self._folder = folder
        self._checkpoint = Checkpoint.open(folder)
        self._formats = _read_formats(folder, self._checkpoint)
        self._storage = np.dtype(storage)
        self._progress = progress
        self._taken: set[str] = set()
        self.bits: dict[str, int] = {}

    def graph_bytes(self) -> int:
        """Bytes of all tensors in the form in which the graphs hold them, each once."""
        item = self._storage.itemsize
        infos = self._checkpoint.tensors.values()
        packed = self._formats.keys()
        return sum(
            math.prod(i.shape) * item
            if i.dtype in FLOATS and i.name.rpartition(".")[0] not in packed
            else i.nbytes
            for i in infos
        )

    def has(self, name: str) -> bool:
        """Whether the folder holds `name`, as float or packed."""
        return name in self._formats or name in self._checkpoint.tensors

    def format(self, name: str) -> BlockFormat | None:
        """How `name` is packed, or None for a float tensor."""
        entry = self._formats.get(name)
        return None if entry is None else entry[0]

    def matrix(
        self, name: str, rows: int, columns: int, *, again: bool = False, turned: bool = False
    ) -> Matrix:
        """The ``[rows, columns]`` matrix `name`. Raises `InputRefused` when missing or of another shape.

        A second use of a tensor is an error unless `again` says that it is meant. `turned`: a float
        one is stored as ``[columns, rows]`` (see `families.base.TensorSpec`).
        """
        if name not in self._formats:
            if turned:
                return self.array(name, (columns, rows), again=again).T
            return self.array(name, (rows, columns), again=again)
        if name + NF4_DATA in self._checkpoint:
            return self._nf4(name, rows, columns, again=again)
        if name + CODES in self._checkpoint:
            return self._static(name, rows, columns, again=again)
        form, stored_columns = self._formats[name]
        blocks = -(-columns // form.block)
        if stored_columns != columns:
            raise InputRefused(
                f"{self._folder}: matrix '{name}' has {stored_columns} columns; expected {columns}"
            )
        qdata = self._take(
            name + QDATA, "U8", (rows, blocks, form.block * form.bits // 8), again=again
        )
        scales = self._take(name + SCALES, "F16", (rows, blocks), again=again)
        zeros = None
        if not form.symmetric:
            zeros = self._take(name + ZEROS, "U8", (rows, -(-blocks * form.bits // 8)), again=again)
        self.bits[name] = form.bits
        return PackedMatrix(form, columns, qdata, scales, zeros)

    def _nf4(self, name: str, rows: int, columns: int, *, again: bool) -> Nf4Matrix:
        block = self._formats[name][0].block
        size, maxima = nf4_shapes(rows, columns, block)
        data = self._take(name + NF4_DATA, "U8", (size,), again=again)
        absmax = self._take(name + NF4_SCALES, "F32", (maxima,), again=again)
        self.bits[name] = 4
        return Nf4Matrix(rows, columns, block, data, absmax)

    def _static(self, name: str, rows: int, columns: int, *, again: bool) -> StaticMatrix:
        codes = self._take(name + CODES, "U8", (rows, columns), again=again)
        scales = self._take(name + ROW_SCALES, "F32", (rows,), again=again)
        scale = float(self._take(name + INPUT_SCALE, "F32", (1,), again=again)[0])
        zero = int(self._take(name + INPUT_ZERO, "U8", (1,), again=again)[0])
        if not (np.isfinite(scales).all() and 0 < scale < np.inf):
            raise InputRefused(f"{self._folder}: bad scales of matrix '{name}'; quantize it again")
        self.bits[name] = 8
        return StaticMatrix(codes, scales, scale, zero)

    def array(self, name: str, shape: Sequence[int], *, again: bool = False) -> FloatArray:
        """A float tensor in the storage dtype. Values that float16 cannot hold are refused."""
        raw = self._take(name, None, tuple(shape), again=again)
        self.bits[name] = 8 * self._storage.itemsize
        if raw.dtype == self._storage:
            return raw
        with np.errstate(over="ignore"):
            stored: FloatArray = to_float32(raw, self._checkpoint.info(name).dtype).astype(
                self._storage
            )
        if not np.isfinite(stored).all():
            raise InputRefused(
                f"{self._folder}: tensor '{name}' has values that {self._storage} cannot hold; "
                "export with float32 storage or repair the checkpoint"
            )
        return stored

    def vector(self, name: str, size: int, *, again: bool = False) -> NDArray[np.float32]:
        """A bias or norm weight ``[size]`` as float32: too small to be worth a Cast."""
        raw = self._take(name, None, (size,), again=again)
        self.bits[name] = 32
        return to_float32(raw, self._checkpoint.info(name).dtype)

    def finish(self, unused: Iterable[TensorSpec] = ()) -> dict[str, str]:
        """Tensors knowingly left out, with the reason: buffers, and those that the specs call unused.

        Raises `InputRefused` for any other left over.
        """
        reasons = {tensor.name: tensor.reason for tensor in unused if not tensor.used}
        left = sorted(self._checkpoint.tensors.keys() - self._taken)
        strange = [name for name in left if name not in reasons and not BUFFERS.search(name)]
        if strange:
            raise InputRefused(
                f"{self._folder}: {len(strange)} tensors have no place in the graphs, first "
                f"'{strange[0]}'; the checkpoint is not of this architecture, or its config.json is"
                " of another model"
            )
        return {name: reasons.get(name, "buffer that follows from config.json") for name in left}

    def _take(
        self, name: str, dtype: str | None, shape: tuple[int, ...], *, again: bool
    ) -> NDArray[Any]:
        if name not in self._checkpoint.tensors:
            raise InputRefused(f"{self._folder}: no tensor '{name}'; expected one of shape {shape}")
        info = self._checkpoint.info(name)
        right = info.dtype in FLOATS if dtype is None else info.dtype == dtype
        if not right or info.shape != shape:
            raise InputRefused(
                f"{self._folder}: tensor '{name}' is {info.dtype} {list(info.shape)}; expected "
                f"{dtype or 'floating point'} {list(shape)}"
            )
        if name in self._taken and not again:
            raise ValueError(f"tensor '{name}' is used twice by the graphs")
        self._taken.add(name)
        self._progress(len(self._taken), len(self._checkpoint.tensors), name)
        return self._checkpoint.raw(name)


def _read_formats(folder: Path, checkpoint: Checkpoint) -> dict[str, tuple[BlockFormat, int]]:
    packed = {
        n.removesuffix(end)
        for n in checkpoint.tensors
        for end in (QDATA, NF4_DATA, CODES)
        if n.endswith(end)
    }
    path = folder / QUANTIZATION
    if not path.is_file():
        if packed:
            raise InputRefused(f"{folder}: packed tensors but no {QUANTIZATION}; quantize it again")
        return {}
    formats = {}
    for entry in read_json(path).get("layers", []):
        parsed = _format(path, entry)
        if parsed is not None:
            formats[str(entry["name"])] = parsed
    if formats.keys() != packed:
        odd = min(formats.keys() ^ packed)
        raise InputRefused(f"{path}: '{odd}' is listed or stored, not both; quantize it again")
    return formats


def _format(path: Path, entry: Mapping[str, Any]) -> tuple[BlockFormat, int] | None:
    try:
        if entry["kind"] == "float":
            return None
        form = BlockFormat(entry["bits"], entry["block"], entry["symmetric"])
        columns = entry["columns"]
        whole_rows = entry.get("code") == STATIC_CODE and form.block == columns and form.bits == 8
        good = (
            form.bits in (4, 8)
            and type(form.block) is int
            and (whole_rows or (form.block >= 16 and form.block & (form.block - 1) == 0))
            and type(form.symmetric) is bool
            and type(columns) is int
            and isinstance(entry["name"], str)
        )
    except (TypeError, KeyError) as error:
        raise InputRefused(f"{path}: bad layer entry ({error!r}); quantize it again") from error
    if not good:
        raise InputRefused(
            f"{path}: layer {json.dumps(entry)[:200]}: expected 4 or 8 bits in blocks of a power of"
            " two from 16"
        )
    return form, columns
