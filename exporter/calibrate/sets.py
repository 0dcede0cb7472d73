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

from exporter.calibrate.imageset import ImageSet, Sample
from exporter.calibrate.loaders import folder as plain_folder
from exporter.calibrate.loaders import iu_cxr, mimic_cxr, rocov2
from exporter.calibrate.setfiles import (
    Head,
    Line,
    check_number,
    read_head,
    read_lines,
    set_folder,
    shipped_sets,
)
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused, WrongUsage

__all__ = ["LOADERS", "ImageSet", "Sample", "open_set"]

LOADERS: dict[str, Callable[[Path], ImageSet]] = {
    "rocov2": rocov2.load,
    "iu-cxr": iu_cxr.load,
    "mimic-cxr": mimic_cxr.load,
    "folder": plain_folder.load,
}


class _Head(Head, frozen=True):
    prompt: str


class _Line(Line, frozen=True, forbid_unknown_fields=True):
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
    folder = set_folder(name_or_dir)
    if folder is None:
        known = sorted(p.name for p in shipped_sets() if (p / "images").is_dir())
        raise WrongUsage(
            f"no image set '{name_or_dir}'; expected a folder with set.json one of: "
            f"{', '.join(known) or 'none shipped'}, or {':DIR, '.join(LOADERS)}:DIR"
        )
    head, text, digest = read_head(folder, _Head, "an image set")
    samples = tuple(_sample(folder, where, line) for where, line in read_lines(folder, text, _Line))
    check_number(folder, len(samples), head)
    return ImageSet(head.name, digest, head.prompt, samples)


def _sample(folder: Path, where: str, line: _Line) -> Sample:
    image = _checked_image(folder / "images", line, where)
    return Sample(
        line.id, image, line.patient, line.modality, line.caption, line.facts, line.sha256
    )


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
