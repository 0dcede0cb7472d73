"""manifest.json: what a bundle holds and where it came from, with a digest of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from exporter.core.digest import canonical_json, list_files, sha256_bytes, sha256_file
from exporter.core.errors import InputRefused

SCHEMA = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MAX_MANIFEST = 64 << 20


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A record that refuses unknown keys."""


class FileEntry(Strict, frozen=True, kw_only=True):
    """One file of the bundle: POSIX path inside it, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class Source(Strict, frozen=True, kw_only=True):
    """One input of the build and the digest of its content."""

    name: str
    sha256: str
    details: dict[str, Any] = {}


class Lineage(Strict, frozen=True, kw_only=True):
    """What the bundle was made of."""

    base: Source
    adapters: tuple[Source, ...] = ()
    evaluation: Source | None = None
    calibration: Source | None = None


class Usage(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """What a runtime needs beside the model's own files. `task`: what it does with an input."""

    family: str
    prompt: str
    max_new_tokens: int
    task: str = "caption"


class Manifest(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """The content of manifest.json. `digest` covers everything else in it.

    `settings`: what each quantization method was set to, by method; absent where there is none.
    `allocation`: of a mixed scheme its budget, what each unit costs in which bits, and what was
    chosen; absent for other schemes.
    """

    schema: int
    name: str
    scheme: str
    target: str
    dialect: str
    usage: Usage
    lineage: Lineage
    layers: tuple[dict[str, Any], ...]
    floats: tuple[dict[str, Any], ...]
    tools: dict[str, str]
    checks: dict[str, Any]
    statement: str
    files: tuple[FileEntry, ...]
    settings: dict[str, Any] = {}
    allocation: dict[str, Any] | None = None
    digest: str = ""


def list_entries(bundle: Path) -> tuple[FileEntry, ...]:
    """Entries of all files below `bundle` but the manifest and its signature, sorted by path."""
    names = [p for p in list_files(bundle) if p.as_posix() not in (MANIFEST, SIGNATURE)]
    return tuple(
        FileEntry(
            path=p.as_posix(), size=(bundle / p).stat().st_size, sha256=sha256_file(bundle / p)
        )
        for p in names
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes of the manifest with its digest filled in."""
    value = msgspec.to_builtins(manifest)
    value["digest"] = ""
    value["digest"] = sha256_bytes(canonical_json(value))
    return canonical_json(value)


def read_manifest(bundle: Path) -> Manifest:
    """Read manifest.json and check its form and its own digest.

    Raises `InputRefused` when it is missing, too large, not canonical JSON, of another schema, or
    changed: a manifest must be byte for byte what `encode_manifest` writes.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise InputRefused(f"{bundle}: no {MANIFEST}; expected a bundle made by medexport")
    if path.stat().st_size > MAX_MANIFEST:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes; expected at most {MAX_MANIFEST}")
    data = path.read_bytes()
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(
            f"{path}: {error}; the manifest is damaged, get the bundle again"
        ) from error
    if manifest.schema != SCHEMA:
        raise InputRefused(
            f"{path}: schema {manifest.schema}, expected {SCHEMA}; use the medexport that made it"
        )
    if encode_manifest(manifest) != data:
        raise InputRefused(
            f"{path}: its content does not fit its own digest; it was changed after packaging"
        )
    return manifest
