"""Whose side it is, and what is no organ: sentences written from general English, none of the set's."""

from __future__ import annotations

import pytest

from tests.unit.compare.support import facts_of

SIDES = [
    # What is pushed away has the side, not what pushes.
    ("A hepatic mass displacing the right kidney.", {"kidney: right"}),
    ("Ovarian mass displacing the bowel to the right.", {"bowel: right"}),
    # What follows is the cause, or the meaning.
    ("Compression of the left bronchus by an enlarged left atrium.", {"trachea: left"}),
    ("No flow in the left ovary, suggesting torsion.", {"ovary: left"}),
    ("Opacity in the left lung due to pneumonia.", {"opacity: left"}),
    # Two clauses with a side each.
    ("Fluid around the left ovary and a cyst of the right ovary.", {"ovary: left", "cyst: right"}),
    ("A cyst, 8 mm, in the right kidney.", {"cyst: right"}),
    ("The left lung shows an opacity.", {"opacity: left"}),
    # Sides of the page.
    ("Axial CT (left) and PET (right) showing a nodule in the right upper lobe.", {"nodule: right"}),
    ("Left: axial CT with a nodule.", set()),
    ("Left: 3 cm cyst.", {"cyst: left"}),
    ("Right upper quadrant ultrasound showing gallstones.", set()),
    ("Right-to-left shunt through a septal defect.", set()),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sides"), SIDES)
def test_whose_side_it_is(text: str, sides: set[str]) -> None:
    found = {f for f in facts_of(text) if f.endswith((": left", ": right", ": bilateral"))}
    assert found == sides


ORGANS = [
    ("Fracture of the humeral head.", {"humerus"}),
    ("Fracture of the radial head.", {"radius"}),
    ("Mass of the renal hilum.", {"kidney"}),
    ("Fracture of the nasal bone.", {"nose"}),
    ("Enlarged cervical lymph nodes.", {"neck", "lymph node"}),
    ("Cervical lymphadenopathy.", {"neck"}),
    ("Compression fracture of a thoracic vertebra.", {"thoracic spine"}),
    ("Swelling of the ulnar nerve.", set()),
    ("Patient with renal failure and a heart rate of 90.", set()),
    ("Deformity of the rib cage.", {"rib"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "organs"), ORGANS)
def test_names_that_contain_an_organs_name(text: str, organs: set[str]) -> None:
    found = {f.removeprefix("anatomy ") for f in facts_of(text) if f.startswith("anatomy ")}
    assert found == organs


def test_a_rib_cage_and_a_shunt_of_blood_are_no_devices() -> None:
    said = facts_of("The rib cage is normal. Left to right shunt.")
    assert not any(word in fact for fact in said for word in ("cage", "shunt"))
