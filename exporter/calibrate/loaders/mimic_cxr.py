"""MIMIC-CXR (Johnson et al. 2019): ``files/p10/p10000032/s50414267.txt`` with a folder of images.

The images are DICOM, or JPEG in MIMIC-CXR-JPG. The data use agreement forbids passing either on.
"""

from __future__ import annotations

import re
from pathlib import Path

from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.loaders.common import Entry, data_folder, finish, one_line, read_text
from exporter.core.errors import InputRefused

# A heading stands at the start of a line, in capitals, before a colon.
HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/()-]{2,60}):", re.MULTILINE)
WANTED = ("FINDINGS", "IMPRESSION")
SUFFIXES = (".dcm", ".jpg", ".png")


def load(folder: Path) -> ImageSet:
    """The data set in `folder` (which has ``files/``), or any part of it below.

    The caption is the report's findings and impression, redactions (``___``) kept; reports with
    neither heading are left out. Cases are clustered by subject. Raises `InputRefused` when a study
    has no images, `WrongUsage`, `EnvironmentLacks` for DICOM without pydicom.
    """
    data_folder(folder)
    root = folder / "files" if (folder / "files").is_dir() else folder
    reports = sorted(p for p in root.rglob("s*.txt") if _is_study(p))
    if not reports:
        raise InputRefused(f"{folder}: no report like files/p10/p10000032/s50414267.txt")
    return finish("mimic-cxr", folder, [e for report in reports for e in _study(report)])


def report_text(report: str) -> str:
    """Findings and impression of a report, in the order written, on one line."""
    pieces = HEADING.split(report)
    headings, bodies = pieces[1::2], pieces[2::2]
    return one_line(
        " ".join(b for h, b in zip(headings, bodies, strict=True) if h.strip() in WANTED)
    )


def _is_study(path: Path) -> bool:
    subject = path.parent.name
    return bool(re.fullmatch(r"s\d+", path.stem) and re.fullmatch(r"p\d{8}", subject))


def _study(report: Path) -> list[Entry]:
    images = sorted(p for p in report.with_suffix("").glob("*") if p.suffix in SUFFIXES)
    if not images:
        raise InputRefused(
            f"{report.with_suffix('')}: no images of this study; expected .dcm or .jpg files"
        )
    caption, subject = report_text(read_text(report)), report.parent.name
    if not caption:
        return []
    return [Entry(p.stem, p, subject, "x-ray", caption, (), str(report)) for p in images]
