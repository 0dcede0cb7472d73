"""SHA-256 digests of files, folders and JSON values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, two-space indent and a final newline: equal values, equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return sha256_bytes(canonical_json(value))


def list_files(folder: Path) -> list[Path]:
    """All regular files below `folder`, as paths relative to it, sorted by their POSIX form."""
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(files, key=lambda p: p.as_posix())


def sha256_tree(folder: Path) -> str:
    """One digest for a folder: over the sorted (relative path, file digest) pairs."""
    return sha256_json({p.as_posix(): sha256_file(folder / p) for p in list_files(folder)})
