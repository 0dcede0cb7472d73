"""Text sets: the shipped one, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.calibrate.textset import is_text_set, open_text_set
from exporter.core.data import data_root
from exporter.core.digest import sha256_bytes
from exporter.core.errors import InputRefused, WrongUsage
from tools.write_reports import NAME, read_entities, set_files

LINE = {"id": "a", "text": "No effusion.", "patient": "p"}


def write(folder: Path, lines: list[dict[str, Any]], **head: Any) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    plain = {
        "schema": 1, "kind": "text", "name": "t", "samples": len(lines),
        "samples_sha256": sha256_bytes(text),
    }  # fmt: skip
    (folder / "samples.jsonl").write_bytes(text)
    (folder / "set.json").write_text(json.dumps(plain | head), "utf-8")
    return folder


def test_the_shipped_set_is_what_the_script_writes() -> None:
    folder = data_root("calibration") / NAME
    for name, data in set_files().items():
        assert (folder / name).read_bytes() == data, f"run tools/write_reports.py: {name}"


def test_the_shipped_set() -> None:
    found = open_text_set(NAME)
    # 149 cases without a change show a rate under 2 per cent.
    assert len(found.samples) >= 149 and len({s.patient for s in found.samples}) == 80
    assert {s.kind for s in found.samples} == {"x-ray", "ct", "mri", "ultrasound"}
    for sample in found.samples:
        assert sample.summary and sample.label in ("normal", "abnormal")
        assert sample.entities and "{" not in sample.text + sample.summary
        for entity in sample.entities:
            word = sample.text[entity.start : entity.end]
            assert word == word.strip() and "[" not in word
            # An entity begins and ends with a word.
            assert not sample.text[entity.start - 1].isalnum()
            assert not sample.text[entity.end : entity.end + 1].isalnum()


def test_summaries_state_no_finding_that_the_report_denies() -> None:
    from exporter.compare.quality.facts import extract_facts

    for sample in open_text_set(NAME).samples:
        denied = {s.concept for s in extract_facts(sample.text).statements if s.status == "absent"}
        told = extract_facts(sample.summary or "").statements
        stated = {s.concept for s in told if s.status == "present"}
        assert not denied & stated, sample


def test_marks_become_places() -> None:
    text, entities = read_entities("A [F cyst] of the [A liver].")
    assert text == "A cyst of the liver."
    assert [(e["type"], text[e["start"] : e["end"]]) for e in entities] == [
        ("finding", "cyst"), ("anatomy", "liver"),
    ]  # fmt: skip


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    entity = {"type": "finding", "start": 3, "end": 11}
    found = open_text_set(str(write(tmp_path, [LINE | {"entities": [entity], "label": "x"}])))
    (case,) = found.samples
    assert case.entities is not None and case.text[3:11] == "effusion"
    assert (case.label, case.summary, case.kind) == ("x", None, "text")
    assert is_text_set(str(tmp_path)) and not is_text_set("phantoms-eval")


@pytest.mark.parametrize(
    ("lines", "head", "why"),
    [
        ([LINE, LINE], {}, "samples.jsonl:2: id 'a' occurs twice"),
        ([LINE | {"text": " "}], {}, "a text of 1 characters"),
        ([LINE | {"entities": [{"type": "f", "start": 3, "end": 13}]}], {}, "entity at 3 to 13"),
        ([LINE | {"entities": [{"type": "f", "start": 3, "end": 3}]}], {}, "entity at 3 to 3"),
        ([LINE | {"image": "a.png"}], {}, "samples.jsonl:1: .*image"),
        ([LINE], {"samples": 2}, "set.json says 2"),
        ([], {}, "0 samples"),
        ([LINE], {"schema": 2}, "schema 2"),
        ([LINE], {"kind": "image"}, "expected the keys of a text set"),
        ([LINE], {"samples_sha256": "0" * 64}, "the set was changed"),
    ],
)
def test_bad_sets_are_refused(
    lines: list[dict[str, Any]], head: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=why):
        open_text_set(str(write(tmp_path, lines, **head)))


def test_an_unknown_name_lists_the_text_sets() -> None:
    with pytest.raises(WrongUsage, match="no text set 'none'.*one of: reports-eval"):
        open_text_set("none")
