"""Loaders on small data in the published layouts, whole and damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from exporter.calibrate.loaders.mimic_cxr import report_text
from exporter.calibrate.sets import ImageSet, open_set
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused, WrongUsage


def draw(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rocov2(folder: Path) -> Path:
    for split, count in (("train", 3), ("test", 1)):
        names = [f"ROCOv2_2023_{split}_{i:06d}" for i in range(1, count + 1)]
        rows = "".join(f'{n},"Axial CT, with\nlesion {n[-1]}."\n' for n in names)
        write(folder / f"{split}_captions.csv", "ID,Caption\n" + rows)
        concepts = "".join(f"{n},C0817096;C0040405\n" for n in names[:2])
        write(folder / f"{split}_concepts.csv", "ID,CUIs\n" + concepts)
        for i, name in enumerate(names):
            draw(folder / f"{split}_images" / f"{name}.jpg", 40 * i + len(split))
    return folder


def iu_tables(folder: Path) -> Path:
    write(
        folder / "indiana_reports.csv",
        "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
        "1,normal,normal,Xray Chest PA,Positive TB test,None.,"
        '"Heart size is normal, lungs clear. XXXX.",Normal chest x-XXXX.\n'
        "2,Cardiomegaly/mild;Opacity,Cardiomegaly,Xray,Pain,,,Mild cardiomegaly.\n"
        "3,normal,normal,Xray,Pain,,,\n",
    )
    names = ["1_IM-0001-4001.dcm.png", "1_IM-0001-3001.dcm.png", "2_IM-0652-1001.dcm.png"]
    kinds = ["Frontal", "Lateral", "Frontal"]
    rows = [f"{n[0]},{n},{k}\n" for n, k in zip(names, kinds, strict=True)]
    write(
        folder / "indiana_projections.csv",
        "uid,filename,projection\n" + "".join(rows) + "3,3_IM-1384-1001.dcm.png,Frontal\n",
    )
    for i, name in enumerate(names):
        draw(folder / "images" / "images_normalized" / name, i)
    return folder


XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR{n}"/><pmcId id="{n}"/>
<MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">XXXX-year-old</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">Normal chest x-XXXX.</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>normal</major></MeSH>
<parentImage id="CXR{n}_1_IM-0001-3001"><figureId>F1</figureId></parentImage>
<parentImage id="CXR{n}_1_IM-0001-4001"><figureId>F2</figureId></parentImage>
</eCitation>
"""


def iu_xml(folder: Path) -> Path:
    for n, findings in ((2, "Lungs are clear."), (10, "")):
        write(folder / "ecgen-radiology" / f"{n}.xml", XML.format(n=n, findings=findings))
        for view in ("3001", "4001"):
            draw(folder / "NLMCXR_png" / f"CXR{n}_1_IM-0001-{view}.png", n + int(view[0]))
    return folder


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.

 FINDINGS:

 There is no focal consolidation: the lungs are clear.
 Heart size is normal.

 IMPRESSION:

 No acute cardiopulmonary process.
"""


def mimic(folder: Path) -> Path:
    for subject, study, images in (
        ("p10000032", "s50414267", ("02aa804e", "174413ec")),
        ("p10000032", "s53189527", ("2a2277a9",)),
        ("p11000011", "s51029426", ("8959e402",)),
    ):
        base = folder / "files" / subject[:3] / subject
        text = REPORT if study != "s53189527" else "WET READ: no change.\n"
        write(base / f"{study}.txt", text)
        for i, name in enumerate(images):
            draw(base / study / f"{name}.jpg", int(study[1:4]) % 200 + i)
    return folder


def plain(folder: Path) -> Path:
    draw(folder / "1.png")
    draw(folder / "deep" / "2.jpg", 9)
    write(
        folder / "captions.jsonl",
        '{"image": "1.png", "caption": "Ein Röntgenbild.", "patient": "A", "modality": "x-ray"}\n\n'
        '{"image": "deep/2.jpg", "caption": " A  CT\\n of the head. ", "id": "second"}\n',
    )
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "rocov2": rocov2,
    "iu-cxr": iu_tables,
    "mimic-cxr": mimic,
    "folder": plain,
}


def opened(layout: str, folder: Path) -> ImageSet:
    return open_set(f"{layout}:{folder}")


def test_rocov2(tmp_path: Path) -> None:
    found = opened("rocov2", rocov2(tmp_path))
    assert found.name == "rocov2-train-test" and len(found.samples) == 4
    first, third = found.samples[0], found.samples[2]
    assert (first.id, first.patient) == ("ROCOv2_2023_train_000001",) * 2
    assert first.caption == "Axial CT, with lesion 1."
    assert (first.modality, first.facts) == ("ct", ("C0817096", "C0040405"))
    assert (third.modality, third.facts) == ("unknown", ())
    assert first.image_path == tmp_path / "train_images" / "ROCOv2_2023_train_000001.jpg"
    assert first.image_sha256 == sha256_file(first.image_path)
    assert [s.id[12:16] for s in opened("rocov2", tmp_path / "test").samples] == ["test"]
    assert opened("rocov2", tmp_path / "train").name == "rocov2-train"


def test_iu_cxr_tables(tmp_path: Path) -> None:
    found = opened("iu-cxr", iu_tables(tmp_path))
    assert [s.patient for s in found.samples] == ["CXR1", "CXR1", "CXR2"]
    assert found.samples[1].caption == (
        "Heart size is normal, lungs clear. XXXX. Normal chest x-XXXX."
    )
    assert found.samples[2].caption == "Mild cardiomegaly."
    assert found.samples[2].facts == ("Cardiomegaly/mild", "Opacity")
    assert {s.modality for s in found.samples} == {"x-ray"}


def test_iu_cxr_xml(tmp_path: Path) -> None:
    found = opened("iu-cxr", iu_xml(tmp_path))
    assert [s.id[:5] for s in found.samples] == ["CXR2_", "CXR2_", "CXR10", "CXR10"]
    first, last = found.samples[0], found.samples[-1]
    assert (first.patient, first.facts) == ("CXR2", ("normal",))
    assert first.caption == "Lungs are clear. Normal chest x-XXXX."
    assert last.caption == "Normal chest x-XXXX."


def test_mimic_cxr(tmp_path: Path) -> None:
    found = opened("mimic-cxr", mimic(tmp_path))
    assert [s.id for s in found.samples] == ["02aa804e", "174413ec", "8959e402"]
    assert [s.patient for s in found.samples] == ["p10000032", "p10000032", "p11000011"]
    assert found.samples[0].caption == (
        "There is no focal consolidation: the lungs are clear. Heart size is normal. "
        "No acute cardiopulmonary process."
    )
    part = opened("mimic-cxr", tmp_path / "files" / "p11")
    assert [s.id for s in part.samples] == ["8959e402"]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("IMPRESSION: Normal.", "Normal."),
        ("Findings: lower case is no heading", ""),
        (" FINDINGS: A.\n\n IMPRESSION: ___ B.\n NOTIFICATION: Dr. ___.", "A. ___ B."),
        ("FINDINGS AND IMPRESSION: none of both", ""),
    ],
)
def test_report_sections(report: str, expected: str) -> None:
    assert report_text(report) == expected


def test_plain_folder(tmp_path: Path) -> None:
    found = opened("folder", plain(tmp_path / "mine"))
    assert found.name == "folder-mine"
    one, two = found.samples
    assert (one.id, one.patient, one.modality) == ("1.png", "A", "x-ray")
    assert (two.id, two.patient, two.caption) == ("second", "second", "A CT of the head.")
    assert two.modality == "unknown" and found.cases()[1].image == two.image_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_digest_follows_images_and_captions(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "a")
    first = opened(layout, folder)
    shutil.copytree(folder, tmp_path / "b" / "a")
    assert opened(layout, tmp_path / "b" / "a").digest == first.digest
    draw(first.samples[0].image_path, 255)
    assert opened(layout, folder).digest != first.digest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_images_and_folders_are_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="no such folder"):
        opened(layout, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="empty"):
        opened(layout, tmp_path / "empty")
    folder = LAYOUTS[layout](tmp_path / "set")
    opened(layout, folder).samples[-1].image_path.unlink()
    with pytest.raises(InputRefused, match=r"missing|no images of this study") as refused:
        opened(layout, folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "file", "old", "new", "message"),
    [
        ("rocov2", "train_captions.csv", "ID,Caption", "Name,Text", "no column ID, Caption"),
        ("rocov2", "train_captions.csv", "_000002,", "_000002,a,b,", ":5: 4 fields, the header has"),
        ("rocov2", "train_captions.csv", "_000002", "_000001", "occurs twice"),
        ("rocov2", "train_captions.csv", "ROCOv2_2023_train_000002", "../x", "no plain file name"),
        ("rocov2", "train_concepts.csv", "CUIs", "C", "train_concepts.csv: no column CUIs"),
        ("iu-cxr", "indiana_reports.csv", "\n2,", "\n1,", "reports.csv:3: uid '1' occurs twice"),
        ("iu-cxr", "indiana_reports.csv", '"Heart', '"He"art', "no CSV table in UTF-8"),
        ("iu-cxr", "indiana_projections.csv", "2,2_IM", "7,2_IM", "uid '7' is not in indiana_reports"),
        ("iu-cxr", "indiana_projections.csv", "2_IM-0652", "../2", "no plain file name"),
        ("folder", "captions.jsonl", "1.png", "../1.png", "captions.jsonl:1: image .* is not inside"),
        ("folder", "captions.jsonl", "1.png", "/etc/passwd", "is not inside"),
        ("folder", "captions.jsonl", "Ein Röntgenbild.", " ", ":1: the caption is empty"),
        ("folder", "captions.jsonl", '"second"', "7", r":3: Expected `str \| null`, got `int`"),
        ("folder", "captions.jsonl", '"second"', '"1.png"', ":3: id '1.png' occurs twice"),
        ("folder", "captions.jsonl", "deep/2.jpg", "deep/3.jpg", "3.jpg is missing, as are 0 more of 2"),
    ],
)  # fmt: skip
def test_damaged_tables_are_refused(
    layout: str, file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = LAYOUTS[layout](tmp_path) / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputRefused, match=message) as refused:
        opened(layout, tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("rocov2", "train_captions.csv"),
        ("iu-cxr", "indiana_reports.csv"),
        ("mimic-cxr", "files/p10/p10000032/s50414267.txt"),
        ("folder", "captions.jsonl"),
    ],
)
def test_what_is_no_utf8_is_refused(layout: str, file: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path) / file
    path.write_bytes(path.read_bytes().replace(b"a", b"\xff"))
    with pytest.raises(InputRefused, match=path.name):
        opened(layout, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</eCitation>", "", "no XML"),
        ('<uId id="CXR2"/>', "", "no uId"),
        ("<eCitation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><eCitation>", "document type declaration"),
        ('parentImage id="CXR2', 'parentImage id="../CXR2', "no plain file name"),
    ],
)
def test_damaged_xml_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = iu_xml(tmp_path) / "ecgen-radiology" / "2.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputRefused, match=message):
        opened("iu-cxr", tmp_path)


def test_two_caption_files_are_refused(tmp_path: Path) -> None:
    plain(tmp_path)
    shutil.copyfile(tmp_path / "captions.jsonl", tmp_path / "old.jsonl")
    with pytest.raises(InputRefused, match="2 JSONL files; expected one"):
        opened("folder", tmp_path)


def test_an_unknown_layout_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="rocov2:DIR, iu-cxr:DIR, mimic-cxr:DIR, folder:DIR"):
        open_set(f"roco:{tmp_path}")
