import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.compare.quality.facts import KINDS, extract_facts
from exporter.compare.quality.measure import find_measurements
from tests.unit.compare.captions import CAPTIONS, expected_facts
from tests.unit.compare.support import facts_of


@pytest.mark.parametrize(("caption", "expected"), CAPTIONS, ids=[c[:40] for c, _ in CAPTIONS])
def test_caption_is_read_as_a_person_reads_it(caption: str, expected: str) -> None:
    assert facts_of(caption) == expected_facts(expected)


def test_there_are_enough_hand_read_captions() -> None:
    assert len({caption for caption, _ in CAPTIONS}) >= 60


@pytest.mark.parametrize("caption", [c for c, _ in CAPTIONS])
def test_spans_point_at_the_words(caption: str) -> None:
    for fact in extract_facts(caption).facts:
        words = caption[fact.start : fact.end]
        assert fact.kind in KINDS
        assert words
        assert words == words.strip()
        if fact.kind == "measurement":
            assert re.search(r"\d|two", words)


@given(st.integers(1, 400))
def test_a_length_is_the_same_in_mm_and_cm(tenths: int) -> None:
    mm = f"a {tenths / 10:g} mm nodule"
    cm = f"a {tenths / 100:.2f} cm nodule"
    assert facts_of(mm) == facts_of(cm)


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    for fact in extract_facts(text).facts:
        assert 0 <= fact.start < fact.end


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("19mm", ["19 mm"]),
        ("1,9 cm", ["19 mm"]),
        ("1,200 mm", ["1200 mm"]),
        ("3 cm x 4 cm", ["40 x 30 mm"]),
        ("4×3 cm", ["40 x 30 mm"]),
        ("2 x 3 x 1 cm", ["30 x 20 x 10 mm"]),
        ("3-4 cm", ["30-40 mm"]),
        ("1 inch", ["25.4 mm"]),
        ("45 hu", ["45 hu"]),
        ("120 mmhg", ["120 mmhg"]),
        ("2 cm2", ["200 mm2"]),
        ("50 ml", ["50 ml"]),
        ("45-year-old", []),
        ("t2 mmap", []),
        ("level l4", []),
        ("5 mm and 7 mm", ["5 mm", "7 mm"]),
    ],
)
def test_measurements(text: str, values: list[str]) -> None:
    assert [m.value for m in find_measurements(text)] == values


PARAPHRASES = [
    ("Small left pleural effusion.", "There is a mild pleural effusion on the left side."),
    ("No pneumothorax.", "Pneumothorax is not seen."),
    ("A 19 mm nodule in the right lung.", "Right lung nodule measuring 1.9 cm."),
    ("Chest X-ray.", "Radiograph of the chest."),
    ("The heart is enlarged.", "Cardiomegaly."),
    ("Both kidneys contain cysts.", "Bilateral cysts of the kidney."),
    ("Left central venous line.", "Central venous catheter on the left."),
    ("Right renal calculus.", "Stone in the right kidney."),
]


@pytest.mark.parametrize(("one", "other"), PARAPHRASES)
def test_harmless_paraphrases_state_the_same(one: str, other: str) -> None:
    ours, theirs = facts_of(one), facts_of(other)
    assert {f for f in ours if not f.startswith("anatomy")} == {
        f for f in theirs if not f.startswith("anatomy")
    }


def test_a_general_word_means_the_special_concept_where_the_organ_is_named() -> None:
    assert "kidney stone present" in facts_of("The right kidney holds a stone.")
    assert "gallstone present" in facts_of("Stones within the gallbladder.")
    assert "stone present" in facts_of("A stone.")


@pytest.mark.parametrize(
    ("text", "stated", "not_stated"),
    [
        ("History of pneumonia.", "pneumonia past", "pneumonia present"),
        ("History of left mastectomy.", "mastectomy present", "mastectomy past"),
        ("Atelectasis versus infiltrate.", "atelectasis possible", "atelectasis present"),
        ("RLL nodule.", "nodule: right", "nodule: left"),
        ("RLL nodule.", "anatomy lower lobe", "anatomy upper lobe"),
        ("Total hip arthroplasties.", "joint prosthesis present", "anatomy hip"),
        ("The heart is not enlarged.", "cardiomegaly absent", "cardiomegaly present"),
        ("Right kidney 98 mm, no stone.", "kidney: 98 mm", "kidney stone: 98 mm"),
        ("A 6 mm calcified granuloma.", "granuloma: 6 mm", "calcification: 6 mm"),
        ("No flow, suggesting torsion.", "torsion possible", "torsion absent"),
        ("Without interval change in the effusion.", "pleural effusion present", "pleural effusion absent"),
        ("Small-bore chest tube.", "chest tube present", "chest tube: mild"),
    ],
)  # fmt: skip
def test_rules_in_single_sentences(text: str, stated: str, not_stated: str) -> None:
    facts = facts_of(text)
    assert stated in facts
    assert not_stated not in facts
