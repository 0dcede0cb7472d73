"""IU-CXR (Indiana University, OpenI; Demner-Fushman et al. 2016): chest X-rays with reports.

As two CSV tables (``indiana_reports.csv``, ``indiana_projections.csv``) or as OpenI's XML files.
Redactions read XXXX and stay: a model that is compared must not learn to fill them in.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.loaders.common import (
    Entry,
    data_folder,
    finish,
    first_file,
    one_line,
    plain_name,
    read_table,
    read_text,
)
from exporter.core.errors import InputRefused

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
IMAGE_FOLDERS = ("images/images_normalized", "images_normalized", "images", "NLMCXR_png", ".")
XML_FOLDERS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", ".")


def load(folder: Path) -> ImageSet:
    """The data set in `folder`: the tables where they are, else the XML files.

    The caption is findings and impression; reports with neither, and reports without images, are
    left out; normal ones stay. Cases are clustered by uid. Facts are the MeSH terms. Raises
    `InputRefused`, `WrongUsage`.
    """
    data_folder(folder)
    if (folder / REPORTS).is_file():
        return finish("iu-cxr", folder, _from_tables(folder))
    files = next((f for n in XML_FOLDERS if (f := sorted((folder / n).glob("*.xml")))), [])
    if not files:
        raise InputRefused(f"{folder}: no {REPORTS} and no XML reports in ecgen-radiology/")
    # By number, as OpenI counts them: 2.xml before 10.xml.
    files.sort(key=lambda p: (len(p.stem), p.stem))
    return finish("iu-cxr", folder, [e for path in files for e in _from_xml(folder, path)])


def _from_tables(folder: Path) -> list[Entry]:
    columns = ("uid", "MeSH", "findings", "impression")
    reports: dict[str, tuple[str, tuple[str, ...]]] = {}
    for where, row in read_table(folder / REPORTS, columns):
        if row["uid"] in reports:
            raise InputRefused(f"{where}: uid '{row['uid'][:40]}' occurs twice; expected it once")
        terms = tuple(t.strip() for t in row["MeSH"].split(";") if t.strip())
        reports[row["uid"]] = (_caption(row["findings"], row["impression"]), terms)
    entries = []
    for where, row in read_table(folder / PROJECTIONS, ("uid", "filename")):
        if row["uid"] not in reports:
            raise InputRefused(
                f"{where}: uid '{row['uid'][:40]}' is not in {REPORTS}; the tables belong together"
            )
        caption, terms = reports[row["uid"]]
        name = plain_name(row["filename"], where)
        image = first_file([folder / n for n in IMAGE_FOLDERS], [name])
        if caption:
            # As the XML files write it, so that both forms of the set overlap.
            patient = f"CXR{row['uid']}"
            entries.append(Entry(name, image, patient, "x-ray", caption, terms, where))
    return entries


def _from_xml(folder: Path, path: Path) -> list[Entry]:
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputRefused(f"{path}: has a document type declaration; OpenI's reports have none")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 (see above)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputRefused(f"{path}: no XML ({error}); download it again") from error
    uid = root.find(".//uId")
    if uid is None or not uid.get("id"):
        raise InputRefused(f"{path}: no uId with an id; expected a report of OpenI")
    parts = {
        str(e.get("Label")).upper(): "".join(e.itertext()) for e in root.iterfind(".//AbstractText")
    }
    caption = _caption(parts.get("FINDINGS", ""), parts.get("IMPRESSION", ""))
    terms = tuple(one_line(e.text) for e in root.iterfind(".//MeSH/major") if e.text)
    entries = []
    for element in root.iterfind(".//parentImage"):
        name = plain_name(element.get("id") or "", str(path))
        places = [folder / n for n in IMAGE_FOLDERS]
        image = first_file(places, [f"{name}.png", f"{name}.jpg"])
        if caption:
            entries.append(
                Entry(name, image, str(uid.get("id")), "x-ray", caption, terms, str(path))
            )
    return entries


def _caption(findings: str, impression: str) -> str:
    return one_line(f"{findings} {impression}")
