"""The header of a safetensors file, checked before anything is believed or allocated."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused

MAX_HEADER = 100_000_000
MAX_AXES = 8
MAX_NUMBER = 2**63 - 1
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
PICKLE_STARTS = frozenset({b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"})
ZIP_START = b"PK\x03\x04"  # torch.save since 1.6
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: byte offsets in `file`, and its dtype as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensor table and metadata of a safetensors file. Raises `InputRefused` on anything inconsistent.

    As the format demands, the tensors must cover the data exactly: no overlap, no hole, no rest.
    """
    refuse_pickle(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InputRefused(
                f"{path}: header of {length} bytes declared in a file of {size} bytes; "
                "expected a safetensors file, download it again"
            )
        header = _parsed(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise InputRefused(f"{path}: __metadata__ is not a JSON object; the file is damaged")
    base = 8 + length
    table = {name: _checked(path, name, entry, base, size) for name, entry in header.items()}
    _refuse_gaps(path, list(table.values()), base, size)
    return table, {str(k): str(v) for k, v in metadata.items()}


def refuse_pickle(path: Path) -> None:
    """Raise `InputRefused` when `path` is missing, or is a pickle by its name or its first bytes."""
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected a safetensors file")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors header of 640 bytes also starts with 80 02; but byte 8 is then its brace.
    magic = start[:2] in PICKLE_STARTS or start[:4] == ZIP_START
    if path.suffix in PICKLE_SUFFIXES or (magic and start[8:] != b"{"):
        raise InputRefused(
            f"{path}: a pickle (it can run code when opened); expected safetensors, "
            "convert it on a machine that may be lost"
        )


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise InputRefused(
            f"{path}: the header is not JSON ({error}); expected a safetensors file"
        ) from error
    if not isinstance(header, dict):
        raise InputRefused(f"{path}: the header is not a JSON object; expected a safetensors file")
    return header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return found


def shown(name: str) -> str:
    """A name from an untrusted file, fit for one line of a message: quoted, escaped and cut."""
    return repr(name if len(name) <= 120 else name[:120] + "...")


def _checked(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {shown(str(dtype))}, expected one of {', '.join(ITEM_BYTES)}")
        numbers = (*shape, begin, end)
        if len(shape) > MAX_AXES or not all(
            type(n) is int and 0 <= n <= MAX_NUMBER for n in numbers
        ):
            raise ValueError("a size or offset is negative, too large, or no integer")
    except (TypeError, KeyError, ValueError) as error:
        raise InputRefused(
            f"{path}: bad entry for tensor {shown(name)} ({error}); the file is damaged or hostile"
        ) from error
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes or base + end > size:
        raise InputRefused(
            f"{path}: tensor {shown(name)} declares {nbytes} bytes at {begin}-{end}, the file holds "
            f"{size - base} bytes of data; it is truncated or hostile, download it again"
        )
    return TensorInfo(name, dtype, shape, path, base + begin, base + end)


def _refuse_gaps(path: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    infos.sort(key=lambda i: (i.begin, i.end))
    place, before = base, "the header"
    for info in infos:
        if info.begin != place:
            what = "overlap" if info.begin < place else "leave a hole between them"
            raise InputRefused(
                f"{path}: {before} and tensor {shown(info.name)} {what}; the file is damaged or hostile"
            )
        place, before = info.end, f"tensor {shown(info.name)}"
    if place != size:
        raise InputRefused(
            f"{path}: {size - place} bytes belong to no tensor; the file is damaged or hostile"
        )
