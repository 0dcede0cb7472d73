"""Safetensors, read with bounded memory and without trust, written as a stream.

The header's offsets are checked against the file before any tensor is read, tensors are read one
by one with `pread` (a memory map would count every touched page of a 14 GB file as ours), and the
writer needs only one tensor in memory at a time: that is why this is not the safetensors package,
against which it is tested.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.header import (
    ITEM_BYTES,
    PICKLE_SUFFIXES,
    TensorInfo,
    read_header,
    refuse_pickle,
    shown,
)

__all__ = [
    "FLOATS",
    "ITEM_BYTES",
    "Checkpoint",
    "SafetensorsWriter",
    "TensorInfo",
    "read_header",
    "refuse_pickle",
    "to_float32",
    "total_bytes",
]

MAX_INDEX = 64 << 20
MAX_NAME = 255
COMPARED = 1 << 22
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Float32 values of a raw array as stored (`BF16` arrives as uint16)."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


class Checkpoint:
    """The tensors of a folder (one file, or shards with an index), read one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            table, metadata = read_header(path)
            twice = self.tensors.keys() & table.keys()
            if twice:
                raise InputRefused(
                    f"{path}: tensor {shown(min(twice))} is also in another shard; expected each once"
                )
            self.tensors |= table
            self.metadata |= metadata

    @classmethod
    def open(cls, folder: Path, stem: str = "model") -> Checkpoint:
        """Open `folder/<stem>.safetensors`, or the shards of `<stem>.safetensors.index.json`.

        Raises `InputRefused` when files or shards are missing, the index and the shards disagree, or
        there are both a single file and an index.
        """
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if index.is_file() and single.is_file():
            raise InputRefused(
                f"{folder}: holds {single.name} and {index.name}; remove one of them"
            )
        if index.is_file():
            return cls._sharded(folder, index)
        if single.is_file():
            return cls([single])
        suffixes = PICKLE_SUFFIXES | {".safetensors"}
        others = [p.name for p in sorted(folder.glob("*")) if p.suffix in suffixes]
        found = ", ".join(map(shown, others[:5])) or "no weights"
        raise InputRefused(
            f"{folder}: no {single.name} and no index; found {found}; expected safetensors"
        )

    @classmethod
    def _sharded(cls, folder: Path, index: Path) -> Checkpoint:
        weight_map = _weight_map(index)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard or len(shard.encode()) > MAX_NAME:
                raise InputRefused(
                    f"{index}: shard path {shown(shard)} is refused; expected a plain file name"
                )
            if not (folder / shard).is_file():
                raise InputRefused(
                    f"{folder}: shard {shown(shard)} is missing ({len(shards)} in the index); "
                    "download it again"
                )
        opened = cls([folder / s for s in shards])
        places = {name: info.file.name for name, info in opened.tensors.items()}
        if places != weight_map:
            wrong = min(n for n in places | weight_map if places.get(n) != weight_map.get(n))
            raise InputRefused(
                f"{index}: index and shards disagree on tensor {shown(wrong)} (index: "
                f"{weight_map.get(wrong)}, shards: {places.get(wrong)}); download them again"
            )
        return opened

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors under the names that `rename` gives them.

        Raises `InputRefused` when two would have the same name.
        """
        found = Checkpoint(())
        found.metadata = self.metadata
        before: dict[str, str] = {}
        for name, info in self.tensors.items():
            new = rename(name)
            other = before.setdefault(new, name)
            if other != name:
                raise InputRefused(
                    f"{info.file.parent}: {shown(name)} and {shown(other)} are the same tensor in two "
                    "layouts; expected each once"
                )
            found.tensors[new] = replace(info, name=new)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Entry of a tensor; raises `InputRefused` when there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise InputRefused(
                f"tensor {shown(name)} is missing from the checkpoint ({len(self.tensors)} tensors); "
                "is it another architecture?"
            ) from None

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored (`BF16` as uint16)."""
        info = self.info(name)
        data = np.empty(info.nbytes, np.uint8)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin)
            view, got = data.data, 0
            while got < info.nbytes:
                n = file.readinto(view[got:])
                if not n:
                    raise InputRefused(
                        f"{info.file}: ended inside tensor {shown(name)}; "
                        "was it changed while being read?"
                    )
                got += n
        return data.view(NUMPY[info.dtype]).reshape(info.shape)

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors are of one type and shape and hold the same bytes, piece by piece."""
        a, b = self.info(one), self.info(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.file.open("rb") as first, b.file.open("rb") as second:
            first.seek(a.begin)
            second.seek(b.begin)
            for start in range(0, a.nbytes, COMPARED):
                piece = min(COMPARED, a.nbytes - start)
                if first.read(piece) != second.read(piece):
                    return False
        return True

    def float32(self, name: str) -> NDArray[np.float32]:
        """The tensor in float32, writable."""
        info = self.info(name)
        if info.dtype not in FLOATS:
            raise InputRefused(f"tensor {shown(name)} is {info.dtype}; expected floating point")
        return to_float32(self.raw(name), info.dtype)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard name of an index file."""
    if index.stat().st_size > MAX_INDEX:
        raise InputRefused(f"{index}: more than {MAX_INDEX} bytes; expected a shard index")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError("weight_map is empty or names no files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputRefused(
            f"{index}: not a shard index ({error!r}); expected a JSON object with weight_map"
        ) from error
    return dict(weight_map)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor; names, dtypes and shapes are declared first.

    `entries` maps names to (safetensors dtype, shape) in the order in which `write` must follow.
    Leaving the `with` block with a tensor missing raises ValueError.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, Any] = (
            {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        )
        offset = 0
        for name, (dtype, shape) in entries.items():
            size = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left = [(name, dtype, tuple(shape)) for name, (dtype, shape) in entries.items()]
        self._left.reverse()
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append the next tensor. Raises ValueError when it is not the one declared next."""
        expected = self._left[-1] if self._left else None
        code = CODES.get(array.dtype.name, "")
        if expected and expected[1] == "BF16" and array.dtype == np.uint16:
            code = "BF16"
        if expected != (name, code, array.shape):
            raise ValueError(
                f"tensor ({name}, {code}, {array.shape}) written where {expected} was declared"
            )
        self._file.write(np.ascontiguousarray(array, NUMPY[code]).data)
        self._left.pop()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._left:
            raise ValueError(
                f"{len(self._left)} declared tensors were not written, next '{self._left[-1][0]}'"
            )


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Sum of the tensors' bytes."""
    return sum(i.nbytes for i in infos)
