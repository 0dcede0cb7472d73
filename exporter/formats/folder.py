"""Writes a quantized model folder from matrices that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.core.artifact import need_space
from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat, PackedMatrix
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import copy_small_files
from exporter.core.progress import Progress, silent
from exporter.core.tensors import ITEM_BYTES, SafetensorsWriter
from exporter.families.checkpoints import published_config

REPORT = "quantization.json"
SCHEMA = 1
MAX_FLOAT16 = 65504.0


class Entry(Protocol):
    """Something that will be stored under the name of one tensor of the model."""

    @property
    def name(self) -> str:
        """The tensor's name in the model."""
        ...

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors: name to (dtype, shape)."""
        ...

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The same with their values."""
        ...

    def row(self) -> dict[str, Any]:
        """Its row of quantization.json, without sizes and method; a float one has a reason."""
        ...


@dataclass(frozen=True)
class PackedEntry:
    """A matrix that will be stored packed; `read` gives it when its turn comes."""

    name: str
    kind: str
    rows: int
    columns: int
    format: BlockFormat
    read: Callable[[], PackedMatrix]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors: name to (dtype, shape)."""
        form, blocks = self.format, -(-self.columns // self.format.block)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            self.name + QDATA: ("U8", (self.rows, blocks, form.block * form.bits // 8)),
            self.name + SCALES: ("F16", (self.rows, blocks)),
        }
        if not form.symmetric:
            found[self.name + ZEROS] = ("U8", (self.rows, -(-blocks * form.bits // 8)))
        return found

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The same with their values."""
        packed = self.read()
        yield self.name + QDATA, packed.qdata
        yield self.name + SCALES, packed.scales
        if packed.zero_points is not None:
            yield self.name + ZEROS, packed.zero_points

    def row(self) -> dict[str, Any]:
        """Its row of quantization.json."""
        return {
            "name": self.name,
            "kind": self.kind,
            "bits": self.format.bits,
            "block": self.format.block,
            "symmetric": self.format.symmetric,
            "columns": self.columns,
            "rows": self.rows,
        }


@dataclass(frozen=True)
class FloatEntry:
    """A tensor that will be stored in float16, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    read: Callable[[], NDArray[np.float32]]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors: name to (dtype, shape)."""
        return {self.name: ("F16", self.shape)}

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The same with its values; refuses what float16 cannot hold."""
        yield self.name, as_float16(self.name, self.read())

    def row(self) -> dict[str, Any]:
        """Its row of quantization.json."""
        return {"name": self.name, "reason": self.reason}


@dataclass(frozen=True)
class Imported:
    """What a reader found: the entries in storage order, and notes for the user.

    `errors` is filled while the entries are written, where an original is there to compare with:
    Frobenius norm of the error over that of the matrix.
    """

    scheme: str
    method: str
    entries: Sequence[Entry]
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def as_float16(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Float16 values. Raises `InputRefused` for NaN, infinity or values beyond 65504."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= MAX_FLOAT16:
        raise InputRefused(
            f"tensor '{name}' holds {largest}; expected finite values within float16 (65504)"
        )
    return values.astype(np.float16)


def write_folder(
    source: Path, out: Path, found: Imported, *, progress: Progress = silent
) -> Imported:
    """Write the quantized folder into the empty folder `out`, with the small files of `source`.

    One matrix is in memory at a time. `relative_error` is null in quantization.json where there was
    no original to compare with. Raises `InputRefused` for a damaged tensor.
    """
    declared = {n: e for entry in found.entries for n, e in entry.tensors().items()}
    sizes = {n: ITEM_BYTES[d] * int(np.prod(s, dtype=np.int64)) for n, (d, s) in declared.items()}
    need_space(out, sum(sizes.values()) + (64 << 20))
    copy_small_files(source, out)
    config = found.config or published_config(source)
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    (out / "config.json").write_bytes(canonical_json(config))
    with SafetensorsWriter(out / "model.safetensors", declared) as writer:
        for done, entry in enumerate(found.entries, 1):
            for name, array in entry.arrays():
                writer.write(name, array)
            progress(done, len(found.entries), entry.name)
    (out / REPORT).write_bytes(canonical_json(_document(found, sizes)))
    return found


def _document(found: Imported, sizes: dict[str, int]) -> dict[str, Any]:
    layers, floats = [], []
    for entry in found.entries:
        row = {**entry.row(), "bytes": sum(sizes[n] for n in entry.tensors())}
        if "reason" in row:
            floats.append(row)
        else:
            error = found.errors.get(entry.name)
            layers.append({**row, "method": found.method, "relative_error": error})
    return {
        "schema": SCHEMA,
        "scheme": found.scheme,
        "layers": layers,
        "floats": floats,
        "notes": list(found.notes),
    }
