"""What the loaders share: tables, image files, and the finished set."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.calibrate.imageset import ImageSet, Sample
from exporter.core.digest import sha256_file, sha256_json
from exporter.core.errors import InputRefused, WrongUsage, require
from exporter.runtimes.dicom import is_dicom

PROMPT = "Describe this medical image."
MAX_TEXT = 1 << 30
MAX_REPORT = 1 << 20
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """A row of a data set before its image is looked at; `where` names the row in messages."""

    id: str
    image: Path
    patient: str
    modality: str
    caption: str
    facts: tuple[Any, ...]
    where: str


def finish(name: str, folder: Path, entries: Sequence[Entry]) -> ImageSet:
    """The set of `entries`, their images hashed.

    Raises `InputRefused` when there are none, an id repeats or an image is missing;
    `EnvironmentLacks` when there is a DICOM image and no pydicom.
    """
    if not entries:
        raise InputRefused(f"{folder}: no image with a caption; expected the layout of {name}")
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            raise InputRefused(
                f"{entry.where}: id '{entry.id[:80]}' occurs twice; expected it once"
            )
        seen.add(entry.id)
    missing = [e for e in entries if not e.image.is_file()]
    if missing:
        raise InputRefused(
            f"{missing[0].where}: {missing[0].image} is missing, as are {len(missing) - 1} more of "
            f"{len(entries)} images; unpack the images of the data set there"
        )
    samples = tuple(_sample(e) for e in entries)
    rows = [[s.id, s.image_sha256, s.patient, s.modality, s.caption] for s in samples]
    return ImageSet(name, sha256_json({"prompt": PROMPT, "samples": rows}), PROMPT, samples)


def _sample(entry: Entry) -> Sample:
    if is_dicom(entry.image):
        require("pydicom", "dicom")
    return Sample(
        entry.id,
        entry.image,
        entry.patient,
        entry.modality,
        entry.caption,
        entry.facts,
        sha256_file(entry.image),
    )


def data_folder(folder: Path) -> Path:
    """`folder` itself. Raises `WrongUsage` when it is none."""
    if not folder.is_dir():
        raise WrongUsage(f"{folder}: no such folder; expected the data set's")
    return folder


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header, each with its place (``file:line``).

    Raises `InputRefused` when the file is missing, is no UTF-8, lacks one of `columns`, or a row has
    another number of fields than the header.
    """
    if not path.is_file() or path.stat().st_size > MAX_TEXT:
        raise InputRefused(f"{path}: no such file, or above {MAX_TEXT} bytes; expected a CSV table")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            lacking = [c for c in columns if c not in header]
            if lacking:
                raise InputRefused(
                    f"{path}: no column {', '.join(lacking)}; expected the header {','.join(columns)}"
                )
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if len(fields) != len(header):
                    raise InputRefused(
                        f"{where}: {len(fields)} fields, the header has {len(header)}; "
                        "download the file again"
                    )
                yield where, dict(zip(header, fields, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputRefused(f"{path}: no CSV table in UTF-8 ({error}); download it again") from error


def read_text(path: Path) -> str:
    """A report of bounded size. Raises `InputRefused` when it is too large or no UTF-8."""
    if path.stat().st_size > MAX_REPORT:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes; expected a report")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path}: no text in UTF-8 ({error}); download it again") from error


def plain_name(name: str, where: str) -> str:
    """`name` when it is a plain file name. Raises `InputRefused`."""
    if Path(name).name != name or "\\" in name or "\0" in name or name in {"", ".", ".."}:
        raise InputRefused(f"{where}: '{name[:80]}' is no plain file name; expected one")
    return name


def first_file(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """The first of ``folder/name`` that is a file, or the first of all when none is."""
    places = [folder / name for folder in folders for name in names]
    return next((p for p in places if p.is_file()), places[0])


def one_line(text: str) -> str:
    """`text` with single spaces, as captions are compared and tokenized."""
    return " ".join(text.split())
