"""Text sets: a folder with set.json and samples.jsonl, checked before it is used.

set.json has ``schema`` (1), ``kind`` ("text"), ``name``, ``samples`` (their number) and
``samples_sha256`` (of samples.jsonl); further keys are for people. Each line of samples.jsonl has
``id``, ``text``, ``patient`` and, where known, ``kind`` (such as the examination), ``summary``,
``label`` and ``entities`` (each ``type``, ``start`` and ``end`` in characters of the text).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from exporter.core.data import data_root
from exporter.core.digest import sha256_bytes, sha256_json
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.text_cases import Entity, TextCase

SCHEMA = 1
MAX_TEXT = 100_000


@dataclass(frozen=True)
class TextSet:
    """A checked set of texts; `digest` covers every text and what is known of it."""

    name: str
    digest: str
    samples: tuple[TextCase, ...]


class _Head(msgspec.Struct, frozen=True):
    schema: int
    kind: Literal["text"]
    name: str
    samples: int
    samples_sha256: str


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    text: str
    patient: str
    kind: str = "text"
    summary: str | None = None
    label: str | None = None
    entities: tuple[Entity, ...] | None = None


def open_text_set(name_or_dir: str) -> TextSet:
    """Open a shipped set by name, or any set by its folder.

    Raises `WrongUsage` when there is no such set, `InputRefused` (with the line of samples.jsonl) on
    wrong types, a wrong hash, repeated ids, empty texts, or entities that lie outside their text.
    """
    folder = _find(name_or_dir)
    head_path, lines_path = folder / "set.json", folder / "samples.jsonl"
    head_bytes, text = _read(head_path), _read(lines_path)
    try:
        head = msgspec.json.decode(head_bytes, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputRefused(f"{head_path}: {error}; expected the keys of a text set") from error
    if head.schema != SCHEMA:
        raise InputRefused(f"{head_path}: schema {head.schema}; this version reads schema {SCHEMA}")
    found = sha256_bytes(text)
    if found != head.samples_sha256:
        raise InputRefused(
            f"{lines_path}: sha256 {found[:12]}..., set.json says {head.samples_sha256[:12]}...; "
            "the set was changed, restore it"
        )
    samples = _samples(lines_path, text)
    if len(samples) != head.samples or not samples:
        raise InputRefused(
            f"{lines_path}: {len(samples)} samples, set.json says {head.samples}; expected at least "
            "one and the same number"
        )
    digest = sha256_json({"set.json": sha256_bytes(head_bytes), "samples.jsonl": found})
    return TextSet(head.name, digest, samples)


def is_text_set(name_or_dir: str) -> bool:
    """Whether there is a set of that name or in that folder, and its set.json says kind "text"."""
    for folder in _places(name_or_dir):
        try:
            msgspec.json.decode((folder / "set.json").read_bytes(), type=_Head)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue
        return True
    return False


def _places(name_or_dir: str) -> tuple[Path, Path]:
    return Path(name_or_dir), data_root("calibration") / name_or_dir


def _find(name_or_dir: str) -> Path:
    for folder in _places(name_or_dir):
        if (folder / "set.json").is_file():
            return folder
    shipped = sorted(p.parent.name for p in data_root("calibration").glob("*/set.json"))
    known = [name for name in shipped if is_text_set(name)]
    raise WrongUsage(
        f"no text set '{name_or_dir}'; expected a folder with set.json or one of: "
        f"{', '.join(known) or 'none shipped'}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected a file of a text set") from error


def _samples(path: Path, text: bytes) -> tuple[TextCase, ...]:
    decoder = msgspec.json.Decoder(_Line)
    samples: dict[str, TextCase] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputRefused(f"{where}: {error}") from error
        if line.id in samples:
            raise InputRefused(f"{where}: id '{line.id}' occurs twice; expected unique ids")
        if not line.text.strip() or len(line.text) > MAX_TEXT:
            raise InputRefused(
                f"{where}: a text of {len(line.text)} characters; expected 1 to {MAX_TEXT}"
            )
        outside = [e for e in line.entities or () if not 0 <= e.start < e.end <= len(line.text)]
        if outside:
            raise InputRefused(
                f"{where}: entity at {outside[0].start} to {outside[0].end} of a text of "
                f"{len(line.text)} characters; expected places inside it"
            )
        samples[line.id] = TextCase(
            line.id, line.text, line.patient, line.kind, line.summary, line.entities, line.label
        )
    return tuple(samples.values())
