"""Figures from captions whose facts can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats

from exporter.compare.assemble import (
    Judge,
    Judged,
    case_rows,
    distribution_figures,
    length_figures,
    moved_figures,
    rouge1_figures,
    slices,
    truth_figures,
)
from exporter.compare.jobs import CaseResult, Scores
from exporter.compare.records import SCHEMA, Comparison, Row
from exporter.compare.report import render_report
from exporter.compare.speed import SpeedPlan
from exporter.compare.wording import summary_line
from exporter.core.cases import Case

TRUTHS = (
    "CT of the abdomen: 14 mm cyst in the left kidney.",  # modality, 2 anatomy, cyst, side, size
    "MRI of the brain. No hydrocephalus.",  # modality, anatomy, finding
    "Chest X-ray with a pacemaker.",  # modality, anatomy, device
)
REFERENCE = (TRUTHS[0], "MRI of the brain. Mild hydrocephalus.", TRUTHS[2])
CANDIDATE = (
    "CT of the abdomen: 41 mm cyst in the right kidney.",  # 2 flips
    "MRI of the brain. Mild hydrocephalus.",
    "Chest X-ray.",  # the device lost
)


def said(index: int, text: str, kl: float | None = None) -> CaseResult:
    scores = Scores([kl, kl], [True, False], [-1.0], [-2.0]) if kl is not None else None
    tokens = [len(word) for word in text.split()]
    return CaseResult(f"c{index}", text, tokens, index != 2, 9, 0.1, 0.2, 0.3, [0.01], scores)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new("L", (20, 10), 99).save(path)
    modalities = ("ct", "mri", "x-ray")
    return [
        Case(f"c{i}", paths[i], "p0" if i < 2 else "p1", modalities[i], TRUTHS[i]) for i in range(3)
    ]


@pytest.fixture
def judged(cases: list[Case]) -> dict[str, list[Judged]]:
    base = [said(i, t) for i, t in enumerate(REFERENCE)]
    judge = Judge(cases, base)
    other = [said(i, t, kl=0.1 * (i + 1)) for i, t in enumerate(CANDIDATE)]
    return {"fp16": judge.judge(base), "int4": judge.judge(other)}


def test_facts_against_ground_truth(judged: dict[str, list[Judged]]) -> None:
    found = truth_figures(judged["int4"], judged["fp16"])
    assert found is not None
    truth, difference = found
    # 4 of 6, then modality and anatomy of 3, then modality and anatomy of 3.
    assert (truth.right, truth.total) == (8, 12)
    assert truth.by_finding == {"cyst": (1, 3), "hydrocephalus": (0, 1), "pacemaker": (0, 1)}
    # 6 said of the first, 4 of the second (a grade too), 2 of the third.
    assert truth.stated == 12
    assert truth.recall.value == pytest.approx(8 / 12)
    assert truth.precision == pytest.approx(8 / 12)
    assert truth.by_kind["laterality"] == (0, 1)
    assert truth.by_kind["measurement"] == (0, 1)
    assert truth.by_kind["modality"] == (3, 3)
    assert truth.by_kind["device"] == (0, 1)
    # The reference has 6 + 2 + 3 right.
    assert difference.value == pytest.approx((8 - 11) / 12)
    assert (difference.images, difference.patients) == (3, 2)
    assert difference.low is not None
    assert difference.low <= difference.value


def test_facts_against_the_reference(judged: dict[str, list[Judged]]) -> None:
    moved = moved_figures(judged["int4"])
    assert (moved.kept, moved.flipped, moved.lost, moved.added) == (4 + 4 + 2, 2, 1, 0)
    assert moved.flipped_by_kind == {"laterality": 1, "measurement": 1}
    exact = stats.binomtest(1, 3).proportion_ci(0.95, method="exact")
    assert (moved.flips.low, moved.flips.high) == pytest.approx((exact.low, exact.high))
    still = moved_figures(judged["fp16"])
    assert (still.flipped, still.lost, still.added) == (0, 0, 0)


def test_other_figures(judged: dict[str, list[Judged]]) -> None:
    own = judged["int4"]
    rouge = rouge1_figures(own, judged["fp16"])
    assert rouge is not None
    # Eleven words each; the size and the side differ.
    assert own[0].rouge1 == pytest.approx(9 / 11)
    distribution = distribution_figures(own)
    assert distribution is not None
    assert distribution.kl_mean == pytest.approx(0.2)
    assert (distribution.tokens, distribution.images, distribution.top1_agreement) == (6, 3, 0.5)
    assert (distribution.identical, distribution.captions) == (1, 3)
    length = length_figures(own)
    assert length.truncated == 1
    assert length.ratio == pytest.approx((11 + 6 + 2) / (11 + 6 + 5))
    part = slices(own)["ct"]
    assert (part.images, part.right, part.total, part.flips) == (1, 4, 6, 2)


def row(name: str, judged: dict[str, list[Judged]]) -> Row:
    own: Sequence[Judged] = judged[name]
    truth = truth_figures(own, judged["fp16"])
    return Row(
        name=name,
        role="candidate" if name == "int4" else "reference",
        runtime="ort",
        threads=1,
        model_sha256="0" * 64,
        versions={},
        parts={"files": 10},
        bytes=10,
        ratio=0.5,
        length=length_figures(own),
        truth=truth[0] if truth else None,
        moved=moved_figures(own) if name == "int4" else None,
        distribution=distribution_figures(own),
        by_modality=slices(own),
    )


def test_the_report_shows_each_flip_with_both_captions_and_the_image(
    cases: list[Case], judged: dict[str, list[Judged]]
) -> None:
    comparison = Comparison(
        schema=SCHEMA,
        summary="",
        reference="fp16",
        prompt="Describe <this>.",
        max_new_tokens=9,
        images=3,
        patients=2,
        captioned=3,
        modalities={"ct": 1, "mri": 1, "x-ray": 1},
        machine={},
        method={},
        rows=(row("fp16", judged), row("int4", judged)),
        cases=case_rows(judged, Judge(cases, [j.said for j in judged["fp16"]])),
    )
    page = render_report(comparison, {"base": "demo"})
    changed = page[page.index('id="changed"') : page.index('id="worst"')]
    assert "laterality of cyst: left -&gt; right" in changed
    assert "measurement of cyst: 14 mm -&gt; 41 mm" in changed
    assert REFERENCE[0] in changed
    assert CANDIDATE[0] in changed
    assert changed.count("<img ") == 1
    assert "Describe &lt;this&gt;." in page
    assert "2 facts flipped on 1 images" in summary_line(comparison)


@pytest.mark.parametrize(
    ("caption", "load", "images"), [(0.01, 1.0, 22), (1.0, 1.0, 4), (60.0, 9.0, 3)]
)
def test_the_speed_pass_stays_near_its_time(caption: float, load: float, images: int) -> None:
    # 60 s over 3 rounds of 3 models are 6.7 s a process.
    assert SpeedPlan().images(caption, load, 3) == images
