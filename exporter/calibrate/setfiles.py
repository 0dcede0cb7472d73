"""What image sets and text sets share on disk: set.json, and the lines of samples.jsonl under its hash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from exporter.core.data import data_root
from exporter.core.digest import sha256_bytes, sha256_json
from exporter.core.errors import InputRefused

SCHEMA = 1
HEAD, LINES = "set.json", "samples.jsonl"


class Head(msgspec.Struct, frozen=True):
    """What every set.json holds."""

    schema: int
    name: str
    samples: int
    samples_sha256: str


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every line of samples.jsonl holds."""

    id: str


AnyHead = TypeVar("AnyHead", bound=Head)
AnyLine = TypeVar("AnyLine", bound=Line)


def set_folder(name_or_dir: str) -> Path | None:
    """A set's folder, given itself or by the name of a shipped one; None when there is none."""
    places = (Path(name_or_dir), data_root("calibration") / name_or_dir)
    return next((place for place in places if (place / HEAD).is_file()), None)


def shipped_sets() -> list[Path]:
    """The folders of all shipped sets."""
    return sorted(p.parent for p in data_root("calibration").glob(f"*/{HEAD}"))


def read_head(folder: Path, kind: type[AnyHead], what: str) -> tuple[AnyHead, bytes, str]:
    """set.json as `kind`, the bytes of samples.jsonl, and the digest of both.

    `what` names the kind of set in errors. Raises `InputRefused` on wrong types or a wrong hash.
    """
    head_path, lines_path = folder / HEAD, folder / LINES
    head_bytes, text = _read(head_path, what), _read(lines_path, what)
    try:
        head = msgspec.json.decode(head_bytes, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputRefused(f"{head_path}: {error}; expected the keys of {what}") from error
    if head.schema != SCHEMA:
        raise InputRefused(f"{head_path}: schema {head.schema}; this version reads schema {SCHEMA}")
    found = sha256_bytes(text)
    if found != head.samples_sha256:
        raise InputRefused(
            f"{lines_path}: sha256 {found[:12]}..., set.json says {head.samples_sha256[:12]}...; "
            "the set was changed, restore it"
        )
    return head, text, sha256_json({HEAD: sha256_bytes(head_bytes), LINES: found})


def read_lines(folder: Path, text: bytes, kind: type[AnyLine]) -> Iterator[tuple[str, AnyLine]]:
    """Each line of samples.jsonl with its place for errors. Raises `InputRefused` on wrong types and
    on an id that occurs twice.
    """
    decoder, known = msgspec.json.Decoder(kind), set[str]()
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        where = f"{folder / LINES}:{number}"
        try:
            line = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputRefused(f"{where}: {error}") from error
        if line.id in known:
            raise InputRefused(f"{where}: id '{line.id}' occurs twice; expected unique ids")
        known.add(line.id)
        yield where, line


def check_number(folder: Path, found: int, head: Head) -> None:
    """Raise `InputRefused` unless there are samples, as many as set.json says."""
    if found != head.samples or not found:
        raise InputRefused(
            f"{folder / LINES}: {found} samples, set.json says {head.samples}; expected at least one "
            "and the same number"
        )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected a file of {what}") from error
