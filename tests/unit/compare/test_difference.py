"""Faults put into captions must be found, and nothing else."""

import pytest

from exporter.compare.quality.difference import FLIPPED, KEPT, compare_facts, count_changes
from exporter.compare.quality.facts import extract_facts
from tests.unit.compare.captions import CAPTIONS

BASE = "CT of the abdomen shows a 14 mm cyst in the left kidney, mild ascites and a drainage catheter on the right. No kidney stone."


def changes(before: str, after: str) -> set[tuple[str, str]]:
    found = compare_facts(extract_facts(before), extract_facts(after))
    return {(c.outcome, c.text) for c in found if c.outcome != KEPT}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("left kidney", "right kidney", {("flipped", "laterality of cyst: left -> right")}),
        ("on the right", "on the left", {("flipped", "laterality of drainage catheter: right -> left")}),
        ("14 mm", "41 mm", {("flipped", "measurement of cyst: 14 mm -> 41 mm")}),
        ("14 mm", "14 cm", {("flipped", "measurement of cyst: 14 mm -> 140 mm")}),
        ("14 mm", "1.4 cm", set()),
        ("mild", "severe", {("flipped", "severity of ascites: mild -> severe")}),
        ("mild", "small", set()),
        ("No kidney stone", "Kidney stone", {("flipped", "kidney stone: absent -> present")}),
        ("a drainage catheter", "a ureteral stent", {("flipped", "device: drainage catheter -> ureteral stent")}),
        ("CT", "MRI", {("flipped", "modality: ct -> mri")}),
        (" No kidney stone.", "", {("lost", "kidney stone: absent -> nothing")}),
        ("stone.", "stone. Hydronephrosis.", {("added", "hydronephrosis: nothing -> present")}),
        ("No kidney stone", "Kidney stone is not seen", set()),
    ],
)  # fmt: skip
def test_one_fault_is_one_change(old: str, new: str, expected: set[tuple[str, str]]) -> None:
    assert old in BASE
    assert changes(BASE, BASE.replace(old, new)) == expected


@pytest.mark.parametrize("caption", [c for c, _ in CAPTIONS])
def test_a_caption_against_itself_changes_nothing(caption: str) -> None:
    assert changes(caption, caption) == set()


def test_swapped_sizes_of_two_nodules_are_found() -> None:
    before = "A 5 mm nodule in the right lung and a 9 mm nodule in the left lung."
    after = "A 9 mm nodule in the right lung and a 5 mm nodule in the left lung."
    found = changes(before, after)
    assert len(found) == 2
    assert {outcome for outcome, _ in found} == {FLIPPED}


def test_a_denial_beside_a_repeated_statement_is_a_flip() -> None:
    before = "The heart is normal. The lungs are clear. No bony abnormality."
    after = "The heart is normal. The lungs are clear. Bony abnormality."
    assert changes(before, after) == {("flipped", "abnormality: absent -> present")}
    assert changes(after, before) == {("flipped", "abnormality: present -> absent")}


def test_doubt_is_no_flip_but_a_change() -> None:
    found = changes("Pneumonia.", "Pneumonia cannot be excluded.")
    assert {outcome for outcome, _ in found} == {"lost", "added"}


def test_history_is_no_flip_but_a_change() -> None:
    for other in ("Pneumonia.", "No pneumonia."):
        found = changes("History of pneumonia.", other)
        assert {outcome for outcome, _ in found} == {"lost", "added"}


def test_counts_add_up() -> None:
    truth = extract_facts("MRI of the brain: 23 mm mass on the left, no hydrocephalus.")
    said = extract_facts("MRI of the brain: 29 mm mass on the left, mild edema.")
    counts = count_changes(compare_facts(truth, said))
    # modality, anatomy, mass, its side kept; its size flipped; hydrocephalus lost; edema and its grade added.
    assert (counts.kept, counts.flipped, counts.lost, counts.added) == (4, 1, 1, 2)
    assert counts.total == len(truth.facts) == 6
    assert counts.stated == len(said.facts)


FAULTS = [
    (" left ", " right "),
    (" right ", " left "),
    ("No ", ""),
    ("without ", "with "),
    (" mild ", " severe "),
    ("acemaker", "ort catheter"),
]


@pytest.mark.parametrize(("old", "new"), FAULTS)
def test_injected_faults_in_hand_written_captions_are_flips(old: str, new: str) -> None:
    """Every caption in which the fault makes sense ends in a flip."""
    touched = [c for c, _ in CAPTIONS if old in c and not c.startswith(("No change", "No signif",
               "No interval", "No abnorm"))]  # fmt: skip
    for caption in touched:
        both = "Left and right" in caption or "greater" in caption or caption.count(" left ") > 1
        if both or ("left" in caption and "right" in caption):
            continue
        damaged = caption.replace(old, new)
        found = compare_facts(extract_facts(caption), extract_facts(damaged))
        organ = "left ventricle" in caption
        assert organ or any(c.outcome == FLIPPED for c in found), caption
