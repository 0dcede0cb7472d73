"""Verdicts on captions whose faults are known: which quantity decides, and with what words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from exporter.catalog.profiles import find_model
from exporter.catalog.schema import Gate, ModelProfile
from exporter.compare.assemble import Judge
from exporter.compare.decide import decide
from exporter.compare.gate import enforce, judge_candidate
from exporter.compare.jobs import CaseResult, Probe, Scores
from exporter.compare.junit import gate_json, junit_xml
from exporter.compare.quality.loops import has_loop
from exporter.compare.statistics import Interval
from exporter.compare.table import gate_table
from exporter.compare.verdict import GateReport
from exporter.core.cases import Case
from exporter.core.errors import GateFailed, GateInconclusive

IMAGES = 240
SIDES = ("left", "right")
WORDS: dict[str, int] = {}
USUAL = Gate()


def tokens_of(text: str) -> list[int]:
    return [WORDS.setdefault(word, len(WORDS)) for word in text.split()]


def truth(index: int) -> str:
    side, organ = SIDES[index % 2], ("lung", "kidney", "breast")[index % 3]
    return f"{('CT', 'MRI', 'Ultrasound')[index % 3]}: {5 + index} mm cyst in the {side} {organ}. No fracture."


def said(index: int, text: str, *, kl: float = 0.001) -> CaseResult:
    """A caption of the reference or of an honest candidate."""
    tokens = tokens_of(text)
    scores = Scores([kl] * (len(tokens) + 1), [True] * (len(tokens) + 1), [-0.1], [-0.1])
    probe = Probe(blank=tokens_of("No image was given"), prompt="0" * 64)
    return CaseResult(f"c{index}", text, tokens, True, 9, 0.1, 0.1, 0.1, [], scores, probe)


def cases(count: int = IMAGES) -> list[Case]:
    kinds = ("ct", "mri", "us")
    return [
        Case(f"c{i}", Path(f"{i}.png"), f"p{i // 3}", kinds[i % 3], truth(i)) for i in range(count)
    ]


def reference(count: int = IMAGES) -> list[CaseResult]:
    # The reference is wrong on every tenth image, so that not all is right.
    texts = (truth(i).replace("cyst", "mass") if i % 10 == 0 else truth(i) for i in range(count))
    return [said(i, text) for i, text in enumerate(texts)]


def judge(changed: Sequence[CaseResult], gate: Gate = USUAL, *, smoke: bool = False) -> GateReport:
    base = [msgspec.structs.replace(r, scores=None) for r in reference(len(changed))]
    told = [
        msgspec.structs.replace(r, probe=msgspec.structs.replace(r.probe, retold=r.probe.retold or b.text))
        if r.probe else r
        for r, b in zip(changed, base, strict=True)
    ]  # fmt: skip
    judge = Judge(cases(len(changed)), base)
    return judge_candidate("int4", "fp16", judge.judge(told), judge.judge(base), gate, smoke=smoke)


def texts(
    change: Callable[[int, str], str], count: int = IMAGES, kl: float = 0.001
) -> list[CaseResult]:
    return [said(i, change(i, r.text), kl=kl) for i, r in enumerate(reference(count))]


def swap(text: str) -> str:
    side = "left" if "left" in text else "right"
    return text.replace(side, {"left": "right", "right": "left"}[side])


def test_the_same_captions_pass() -> None:
    report = judge(reference())
    assert (report.verdict, report.label, report.smoke) == ("PASS", "PASS", False)
    assert not report.not_measured
    assert {q.verdict for q in report.quantities} == {"PASS"}
    assert (report.images, report.patients) == (240, 80)
    enforce(report)


def test_one_flip_in_240_images_passes_and_four_are_undecided() -> None:
    one = judge(texts(lambda i, t: swap(t) if i == 7 else t))
    assert one.verdict == "PASS"
    four = judge(texts(lambda i, t: swap(t) if i % 60 == 7 else t))
    assert four.verdict == "INCONCLUSIVE"
    assert four.reason.startswith("flips: 4 of 240 images with a fact turned over (laterality 4)")
    assert four.needed is not None
    assert four.needed > 240
    with pytest.raises(GateInconclusive, match=f"{four.needed} images would decide"):
        enforce(four)


def test_twenty_images_are_undecided_and_149_would_decide() -> None:
    report = judge(reference(20))
    assert (report.verdict, report.needed) == ("INCONCLUSIVE", 149)
    assert report.label == "INCONCLUSIVE (smoke test)"
    assert report.reason.startswith("flips: 0 of 20 images"), "it needs the most images"
    table = gate_table(report)
    assert table.startswith("INCONCLUSIVE (smoke test): int4 against fp16")
    assert "149 images would decide it" in " ".join(table.split())
    enforce(report, smoke=True)
    with pytest.raises(GateInconclusive) as caught:
        enforce(report)
    assert caught.value.exit_code == 4


def test_148_images_are_smoke_and_149_are_not() -> None:
    assert judge(reference(148)).smoke
    enough = judge(reference(149))
    assert (enough.verdict, enough.smoke) == ("PASS", False)
    assert judge(reference(149), smoke=True).label == "PASS (smoke test)"


def test_left_for_right_is_named_a_flip() -> None:
    report = judge(texts(lambda _, t: swap(t)))
    assert report.verdict == "FAIL"
    assert report.reason.startswith(
        "flips: 240 of 240 images with a fact turned over (laterality 240)"
    )
    assert report.quantity("image use").verdict == "PASS"
    assert report.quantity("contradictions").verdict == "FAIL"
    with pytest.raises(GateFailed, match="do not release"):
        enforce(report, smoke=True)


def test_captions_that_do_not_depend_on_the_image() -> None:
    blank = "CT: 9 mm cyst in the left lung."
    results = [
        msgspec.structs.replace(r, probe=Probe(blank=list(r.tokens), prompt="0" * 64))
        for r in texts(lambda _, __: blank)
    ]
    report = judge(results)
    assert report.verdict == "FAIL"
    assert report.reason.startswith(
        "image use: captions of ct, mri, us no longer depend on the image"
    )


def test_one_modality_that_is_not_seen_is_named() -> None:
    results = [
        msgspec.structs.replace(r, probe=Probe(blank=list(r.tokens), prompt="0" * 64))
        if i % 3 == 1 and i < 60 else r
        for i, r in enumerate(texts(lambda i, t: truth(1) if i % 3 == 1 and i < 60 else t))
    ]  # fmt: skip
    report = judge(results)
    assert report.verdict == "FAIL"
    assert report.reason.startswith("image use: captions of mri no longer depend")


def test_one_caption_for_all_patients_of_a_modality_is_named() -> None:
    report = judge(texts(lambda i, t: truth(1) if i % 3 == 1 else t))
    assert report.reason.startswith("distinct captions: captions of mri are the same")


def test_another_tokenizer_is_named_before_all_else() -> None:
    shifted = [
        msgspec.structs.replace(
            r, text="xyzzy", probe=msgspec.structs.replace(r.probe, retold="xyzzy")
        )
        for r in reference()
    ]
    report = judge(shifted)
    assert report.reason.startswith("tokenizer: the same tokens become another text in 240 of 240")
    other = [msgspec.structs.replace(r, probe=Probe(r.probe.blank, "1" * 64)) for r in reference()]
    assert "become other input tokens in 240 of 240" in judge(other).reason


def test_cut_captions() -> None:
    cut = [
        msgspec.structs.replace(
            r, text=" ".join(r.text.split()[:4]), tokens=r.tokens[:4], stopped=False
        )
        for r in reference()
    ]
    report = judge(cut)
    assert report.reason.startswith("truncation: 240 of 240 captions cut before their end, 0 of")
    assert report.quantity("length").verdict == "FAIL"
    assert report.quantity("length").value == pytest.approx(4 / 11, abs=0.05)


def test_loops() -> None:
    report = judge(texts(lambda i, t: t + " and more" * 8 if i % 4 == 0 else t))
    assert report.verdict == "FAIL"
    assert report.quantity("repetition").verdict == "FAIL"
    assert report.quantity("repetition").said.startswith("60 of 240 captions repeat")


def test_damage_everywhere_is_a_matter_of_the_distribution() -> None:
    lost = texts(lambda i, t: "CT of something." + str(i), kl=2.0)
    assert judge(lost).reason.startswith("distribution: KL mean 2, median 2 nat")
    assert "tokens moved everywhere" in judge(lost).reason
    # Few tokens far off: the flips they make are the reason, the mean only one more.
    swapped = [
        msgspec.structs.replace(r, scores=Scores([0.0] * 9 + [9.0], [True] * 10, [-0.1], [-0.1]))
        for r in texts(lambda _, t: swap(t))
    ]
    report = judge(swapped)
    assert report.reason.startswith("flips")
    assert report.quantity("distribution").verdict == "FAIL"


def test_lost_facts() -> None:
    report = judge(texts(lambda _, t: t.replace(" No fracture.", "")))
    assert report.quantity("facts right").verdict == "FAIL"
    assert report.quantity("flips").verdict == "PASS"


def test_what_is_not_measured_is_named_and_gates_nothing() -> None:
    bare = [msgspec.structs.replace(r, scores=None, probe=None) for r in reference()]
    judge_ = Judge([replace(c, caption=None) for c in cases()], bare)
    own = judge_.judge(bare)
    report = judge_candidate("a", "b", own, own, Gate())
    missing = {"tokenizer", "image use", "distribution", "contradictions", "facts right", "ROUGE-1"}
    assert set(report.not_measured) == missing
    assert "image use: not measured, no case was captioned" in gate_table(report)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (-0.02, 0.5, (-0.02, None), "PASS"),
        (-0.021, 0.5, (-0.02, None), "INCONCLUSIVE"),
        (-0.5, -0.021, (-0.02, None), "FAIL"),
        (0.0, 0.02, (None, 0.02), "PASS"),
        (0.03, 0.04, (None, 0.02), "FAIL"),
        (0.95, 1.2, (0.9, 1.1), "INCONCLUSIVE"),
        (1.11, 1.2, (0.9, 1.1), "FAIL"),
        (-float("inf"), float("inf"), (-0.02, None), "INCONCLUSIVE"),
    ],
)
def test_three_verdicts(
    low: float, high: float, margin: tuple[float | None, float | None], verdict: str
) -> None:
    assert decide(Interval((low + high) / 2, low, high), margin) == verdict


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1] * 12, True), ([1] * 11, False), ([1, 2, 3, 4] * 3, True), ([1, 2, 3] * 3, False),
        (list(range(17)) * 3, False), (list(range(16)) * 3, True), ([], False), ([5, 1, 2] * 2, False),
        ([9, 8, 7, *([1, 2] * 6)], True), (list(range(40)), False),
    ],
)  # fmt: skip
def test_what_a_loop_is(tokens: list[int], loops: bool) -> None:
    assert has_loop(tokens) is loops


def test_junit_and_json_for_machines() -> None:
    report = judge(texts(lambda i, t: swap(t) + ("\x00" if i == 0 else "")))
    root = ElementTree.fromstring(junit_xml(report))
    suite = root.find("testsuite")
    assert suite is not None
    failed = {c.get("name") for c in suite if c.find("failure") is not None}
    assert "flips" in failed
    assert int(suite.get("failures", "0")) == len(failed)
    assert int(suite.get("tests", "0")) == len(report.quantities)
    undecided = ElementTree.fromstring(
        junit_xml(judge(texts(lambda i, t: swap(t) if i % 60 == 7 else t)))
    )
    assert undecided.get("errors") != "0"
    smoke = ElementTree.fromstring(junit_xml(judge(reference(20))))
    assert (smoke.get("errors"), smoke.get("failures")) == ("0", "0")
    assert smoke.get("skipped") != "0"
    assert "smoke test" in (smoke.find("testsuite").get("name") or "")  # type: ignore[union-attr]
    value = json.loads(json.dumps(gate_json(report)))
    assert (value["schema"], value["verdict"], value["label"]) == (1, "FAIL", "FAIL")
    assert value["reason"].startswith("flips")


def test_margins_are_the_profiles_own() -> None:
    assert find_model("demo").gate == Gate()
    strict = msgspec.convert({"flip_rate": 0.001}, Gate)
    assert judge(reference(), strict).verdict == "INCONCLUSIVE"
    for wrong in ({"flip_rate": 0}, {"flip_rate": 2}, {"fliprate": 0.1}, {"length_high": 0.9}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Gate)
    assert "gate" in {f.name for f in msgspec.structs.fields(ModelProfile)}
