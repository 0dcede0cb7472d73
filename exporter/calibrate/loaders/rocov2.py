"""ROCOv2 (Rückert et al. 2024): ``train|valid|test_captions.csv``, ``*_concepts.csv``, JPEGs.

The images' licences differ from image to image: a set read from here must not be passed on.
"""

from __future__ import annotations

from pathlib import Path

from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.loaders.common import (
    UNKNOWN,
    Entry,
    data_folder,
    finish,
    first_file,
    one_line,
    plain_name,
    read_table,
)
from exporter.core.errors import InputRefused

SPLITS = ("train", "valid", "test")
# UMLS concepts that ROCOv2 uses for the modality.
MODALITIES = {
    "C1306645": "x-ray",
    "C0040405": "ct",
    "C0024485": "mri",
    "C0041618": "ultrasound",
    "C0002978": "angiography",
    "C0032743": "pet",
}


def load(folder: Path) -> ImageSet:
    """The data set in `folder`; ``folder/train`` (or valid, test) is that split alone.

    Images are looked for in ``SPLIT/``, ``SPLIT_images/``, ``images/`` and beside the tables. Nothing
    says who a patient is: each image counts as one. Facts are the concepts (CUIs). Rows without
    a caption are left out. Raises `InputRefused`, `WrongUsage`.
    """
    splits = list(SPLITS)
    if folder.name in SPLITS and (folder.parent / f"{folder.name}_captions.csv").is_file():
        folder, splits = folder.parent, [folder.name]
    data_folder(folder)
    found = [s for s in splits if (folder / f"{s}_captions.csv").is_file()]
    if not found:
        raise InputRefused(
            f"{folder}: no train_captions.csv, valid_captions.csv or test_captions.csv"
        )
    entries = [entry for split in found for entry in _entries(folder, split)]
    return finish("rocov2-" + "-".join(found), folder, entries)


def _entries(folder: Path, split: str) -> list[Entry]:
    concepts = _concepts(folder / f"{split}_concepts.csv")
    places = [folder / split, folder / f"{split}_images", folder / "images", folder]
    entries = []
    for where, row in read_table(folder / f"{split}_captions.csv", ("ID", "Caption")):
        name, caption = plain_name(row["ID"], where), one_line(row["Caption"])
        if not caption:
            continue
        codes = concepts.get(name, ())
        modality = next((MODALITIES[c] for c in codes if c in MODALITIES), UNKNOWN)
        image = first_file(places, [f"{name}.jpg"])
        entries.append(Entry(name, image, name, modality, caption, codes, where))
    return entries


def _concepts(path: Path) -> dict[str, tuple[str, ...]]:
    """Concepts by image; none when the table is not there."""
    if not path.is_file():
        return {}
    return {
        row["ID"]: tuple(c.strip() for c in row["CUIs"].split(";") if c.strip())
        for _, row in read_table(path, ("ID", "CUIs"))
    }
