"""Text sets: a folder with set.json and samples.jsonl, checked before it is used.

set.json has ``schema`` (1), ``kind`` ("text"), ``name``, ``samples`` (their number) and
``samples_sha256`` (of samples.jsonl); further keys are for people. Each line of samples.jsonl has
``id``, ``text``, ``patient`` and, where known, ``kind`` (such as the examination), ``summary``,
``label`` and ``entities`` (each ``type``, ``start`` and ``end`` in characters of the text).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from exporter.calibrate.setfiles import (
    HEAD,
    Head,
    Line,
    check_number,
    read_head,
    read_lines,
    set_folder,
    shipped_sets,
)
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.text_cases import Entity, TextCase

MAX_TEXT = 100_000


@dataclass(frozen=True)
class TextSet:
    """A checked set of texts; `digest` covers every text and what is known of it."""

    name: str
    digest: str
    samples: tuple[TextCase, ...]


class _Head(Head, frozen=True):
    kind: Literal["text"]


class _Line(Line, frozen=True, forbid_unknown_fields=True):
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
    folder = set_folder(name_or_dir)
    if folder is None:
        known = [place.name for place in shipped_sets() if is_text_set(str(place))]
        raise WrongUsage(
            f"no text set '{name_or_dir}'; expected a folder with set.json or one of: "
            f"{', '.join(known) or 'none shipped'}"
        )
    head, text, digest = read_head(folder, _Head, "a text set")
    samples = tuple(_sample(where, line) for where, line in read_lines(folder, text, _Line))
    check_number(folder, len(samples), head)
    return TextSet(head.name, digest, samples)


def is_text_set(name_or_dir: str) -> bool:
    """Whether there is a set of that name or in that folder, and its set.json says kind "text"."""
    folder = set_folder(name_or_dir)
    try:
        found = folder and msgspec.json.decode((folder / HEAD).read_bytes(), type=_Head)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False
    return found is not None


def _sample(where: str, line: _Line) -> TextCase:
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
    return TextCase(
        line.id, line.text, line.patient, line.kind, line.summary, line.entities, line.label
    )
