"""Image sets: a folder with set.json, samples.jsonl and images/, checked before it is used.

set.json has ``schema`` (1), ``name``, ``prompt``, ``samples`` (their number) and
``samples_sha256`` (of samples.jsonl); further keys are for people. Each line of samples.jsonl has
``id``, ``image`` (a file name in images/), ``sha256`` (of that file), ``patient``, ``modality``,
``caption`` and ``facts``. Other layouts are read by loaders/, named as in ``rocov2:DIR``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from exporter.calibrate.imageset import ImageSet, Sample
from exporter.calibrate.loaders import folder as plain_folder
from exporter.calibrate.loaders import iu_cxr, mimic_cxr, rocov2
from exporter.core.data import data_root
from exporter.core.digest import sha256_bytes, sha256_file, sha256_json
from exporter.core.errors import InputRefused, WrongUsage

__all__ = ["LOADERS", "ImageSet", "Sample", "open_set"]

SCHEMA = 1
LOADERS: dict[str, Callable[[Path], ImageSet]] = {
    "rocov2": rocov2.load,
    "iu-cxr": iu_cxr.load,
    "mimic-cxr": mimic_cxr.load,
    "folder": plain_folder.load,
}


class _Head(msgspec.Struct, frozen=True):
    schema: int
    name: str
    prompt: str
    samples: int
    samples_sha256: str


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    image: str
    sha256: str
    patient: str
    modality: str
    caption: str
    facts: tuple[Any, ...] = ()


def open_set(name_or_dir: str) -> ImageSet:
    """Open a shipped set by name, any set by its folder, or data by ``LAYOUT:DIR`` (`LOADERS`).

    Every file of it is checked.

    Raises `WrongUsage` when there is no such set, `InputRefused` (with the line of samples.jsonl)
    on wrong types, wrong hashes, repeated ids, or an image path that is not a plain file name.
    """
    layout, colon, place = name_or_dir.partition(":")
    if colon and layout in LOADERS and not Path(name_or_dir).exists():
        return LOADERS[layout](Path(place))
    folder = _find(name_or_dir)
    head_path, lines_path = folder / "set.json", folder / "samples.jsonl"
    head_bytes, text = _read(head_path), _read(lines_path)
    try:
        head = msgspec.json.decode(head_bytes, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputRefused(f"{head_path}: {error}; expected the keys of an image set") from error
    if head.schema != SCHEMA:
        raise InputRefused(f"{head_path}: schema {head.schema}; this version reads schema {SCHEMA}")
    found = sha256_bytes(text)
    if found != head.samples_sha256:
        raise InputRefused(
            f"{lines_path}: sha256 {found[:12]}..., set.json says {head.samples_sha256[:12]}...; "
            "the set was changed, restore it"
        )
    samples = _samples(folder, lines_path, text)
    if len(samples) != head.samples or not samples:
        raise InputRefused(
            f"{lines_path}: {len(samples)} samples, set.json says {head.samples}; expected at least one "
            "and the same number"
        )
    digest = sha256_json({"set.json": sha256_bytes(head_bytes), "samples.jsonl": found})
    return ImageSet(head.name, digest, head.prompt, samples)


def _find(name_or_dir: str) -> Path:
    shipped = data_root("calibration")
    for folder in (Path(name_or_dir), shipped / name_or_dir):
        if (folder / "set.json").is_file():
            return folder
    known = sorted(p.parent.name for p in shipped.glob("*/set.json"))
    raise WrongUsage(
        f"no image set '{name_or_dir}'; expected a folder with set.json one of: "
        f"{', '.join(known) or 'none shipped'}, or {':DIR, '.join(LOADERS)}:DIR"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected a file of an image set") from error


def _samples(folder: Path, path: Path, text: bytes) -> tuple[Sample, ...]:
    decoder = msgspec.json.Decoder(_Line)
    samples: dict[str, Sample] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputRefused(f"{path}:{number}: {error}") from error
        if line.id in samples:
            raise InputRefused(f"{path}:{number}: id '{line.id}' occurs twice; expected unique ids")
        image = _checked_image(folder / "images", line, f"{path}:{number}")
        samples[line.id] = Sample(
            line.id, image, line.patient, line.modality, line.caption, line.facts, line.sha256
        )
    return tuple(samples.values())


def _checked_image(images: Path, line: _Line, where: str) -> Path:
    name = line.image
    if Path(name).name != name or "\\" in name or "\0" in name or name in {"", ".", ".."}:
        raise InputRefused(f"{where}: image '{name}' is not a plain file name inside images/")
    path = images / name
    if path.is_symlink() or not path.is_file():
        raise InputRefused(f"{where}: image {path} is missing or not a regular file")
    found = sha256_file(path)
    if found != line.sha256:
        raise InputRefused(
            f"{where}: {name} has sha256 {found[:12]}..., expected {line.sha256[:12]}...; restore the file"
        )
    return path
