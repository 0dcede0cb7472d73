"""A plain folder of PNG, JPEG or DICOM files with one JSONL file of captions.

Each line has ``image`` (a path inside the folder) and ``caption``; ``id``, ``patient`` and
``modality`` may be given. Without ``patient`` each image counts as a patient of its own, which
makes a gate believe in more independent cases than there may be.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.loaders.common import (
    MAX_TEXT,
    UNKNOWN,
    Entry,
    data_folder,
    finish,
    one_line,
)
from exporter.core.errors import InputRefused


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    image: str
    caption: str
    id: str | None = None
    patient: str | None = None
    modality: str = UNKNOWN


def load(folder: Path) -> ImageSet:
    """The images of `folder` that its JSONL file names.

    Raises `InputRefused` (with the line) on wrong types, images outside the folder or missing, and
    empty captions; `WrongUsage`; `EnvironmentLacks` for DICOM without pydicom.
    """
    data_folder(folder)
    tables = sorted(folder.glob("*.jsonl"))
    if len(tables) != 1 or tables[0].stat().st_size > MAX_TEXT:
        raise InputRefused(
            f"{folder}: {len(tables)} JSONL files; expected one, with lines like "
            '{"image": "1.png", "caption": "..."}'
        )
    path, decoder, entries = tables[0], msgspec.json.Decoder(_Line), []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            line = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputRefused(f"{where}: {error}") from error
        entries.append(_entry(folder, line, where))
    return finish(f"folder-{folder.resolve().name}", folder, entries)


def _entry(folder: Path, line: _Line, where: str) -> Entry:
    image, caption = folder / line.image, one_line(line.caption)
    inside = "\0" not in line.image and image.resolve().is_relative_to(folder.resolve())
    if not inside or not line.image:
        raise InputRefused(f"{where}: image '{line.image[:80]}' is not inside {folder}")
    if not caption:
        raise InputRefused(f"{where}: the caption is empty; expected text")
    name = line.id or line.image
    return Entry(name, image, line.patient or name, line.modality, caption, (), where)
