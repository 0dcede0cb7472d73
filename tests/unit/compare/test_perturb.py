"""Perturbations of images and what they do to captions, against closed forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from exporter.compare.assemble import Judge
from exporter.compare.blank import Probed
from exporter.compare.candidates import Candidate
from exporter.compare.compare import (
    Comparison,
    Plan,
    compare_models,
    read_comparison,
    write_reports,
)
from exporter.compare.jobs import CaseResult, Job, JobCase, JobResult
from exporter.compare.perturb import PERTURBATIONS, perturb
from exporter.compare.proportions import tango_score
from exporter.compare.records import Robustness
from exporter.compare.robustness import robustness_figures
from exporter.compare.speed import SpeedPlan
from exporter.compare.table import comparison_table
from exporter.compare.worker import answer
from exporter.core.cases import Case
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.runtimes.base import Caption, Timing
from tests.unit.compare.conftest import PROMPT, Models

NAMES = [p.name for p in PERTURBATIONS]
BY_NAME = {p.name: p for p in PERTURBATIONS}
DIGEST = "a5" * 32


def picture(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A smooth bright disc on a dark ground of gray 20."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    disc = 20 + 180 * np.exp(-((x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2) / 80)
    return Image.fromarray(disc.astype(np.uint8)).convert(mode)


def values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image).astype(np.float64)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", NAMES)
def test_perturbations_repeat_keep_the_form_and_change_little(name: str, mode: str) -> None:
    image = picture(mode)
    before = values(image)
    changed = perturb(image, BY_NAME[name], DIGEST)
    assert (changed.size, changed.mode) == (image.size, mode)
    assert changed.tobytes() == perturb(image, BY_NAME[name], DIGEST).tobytes()
    assert (values(image) == before).all(), "the given image is left alone"
    difference = np.abs(values(changed) - before)
    assert 0 < difference.mean() < 5


def test_noise_has_its_sigma_is_cut_and_follows_the_digest() -> None:
    flat = Image.new("L", (300, 300), 128)
    noise = values(perturb(flat, BY_NAME["noise"], DIGEST)) - 128
    # Rounding to whole levels adds 1/12 to the variance.
    assert noise.std() == pytest.approx(np.sqrt(16 + 1 / 12), rel=0.02)
    assert abs(noise.mean()) < 0.05
    assert np.abs(noise).max() <= 16
    other = values(perturb(flat, BY_NAME["noise"], "5a" * 32)) - 128
    assert abs(stats.pearsonr(noise.ravel(), other.ravel()).statistic) < 0.02
    colour = values(perturb(flat.convert("RGB"), BY_NAME["noise"], DIGEST))
    assert (colour == (noise + 128)[..., None]).all(), "gray stays gray"
    white = values(perturb(Image.new("L", (50, 50), 255), BY_NAME["noise"], DIGEST))
    assert white.min() < 255, "cut at white, not wrapped around"
    assert white.min() >= 239


@pytest.mark.parametrize(("name", "factor"), [("contrast-0.9", 0.9), ("contrast-1.1", 1.1)])
def test_contrast_is_about_the_mean(name: str, factor: float) -> None:
    image = picture("L")
    before = values(image)
    wanted = (before.mean() + factor * (before - before.mean())).clip(0, 255)
    # Pillow takes a whole-numbered mean and cuts the product.
    assert np.abs(values(perturb(image, BY_NAME[name], DIGEST)) - wanted).max() <= 1.5


def test_rotation_turns_about_the_middle_and_fills_with_the_border() -> None:
    bright = values(picture("L", (200, 200)))
    bright[98:102, 170:174] = 250
    turned = values(
        perturb(Image.fromarray(bright.astype(np.uint8)), BY_NAME["rotation-3"], DIGEST)
    )
    assert (turned[[0, 0, -1, -1], [0, -1, 0, -1]] == 20).all(), "the border's median is 20"
    # A spot 72 right of the middle moves up by 72 sin 3 degrees (counterclockwise, rows go down).
    spot = turned[80:120, 160:185] - 20
    rows = (spot.sum(1) * np.arange(80, 120)).sum() / spot.sum()
    assert rows == pytest.approx(99.5 - 72 * np.sin(np.radians(3)), abs=0.3)
    colour = Image.new("RGB", (40, 40), (10, 120, 200))
    assert perturb(colour, BY_NAME["rotation-3"], DIGEST).tobytes() == colour.tobytes()


def test_jpeg_refuses_what_it_cannot_hold_and_other_modes_are_refused() -> None:
    with pytest.raises(InputRefused, match="65500"):
        perturb(Image.new("L", (65_501, 1)), BY_NAME["jpeg-60"], DIGEST)
    with pytest.raises(ValueError, match="mode RGBA"):
        perturb(Image.new("RGBA", (4, 4)), BY_NAME["noise"], DIGEST)


class Teller:
    """A captioner of a given rule; `preparer` and `score` are of no use here."""

    def __init__(self, blind: bool) -> None:
        self._blind = blind

    def caption(self, image: Image.Image, prompt: str, max_new_tokens: int) -> Caption:
        level = 5 if self._blind else int(np.asarray(image).astype(int).sum() % 1000)
        timing = Timing(0.1, 0.1, 0.1, ())
        return Caption(f"CT with a {level} mm nodule.", (level,), True, 3, timing)


def told(teller: Teller, cases: Sequence[Case], folder: Path, perturbed: int) -> JobResult:
    asked = tuple(JobCase(c.id, str(c.image), sha256_file(c.image)) for c in cases)
    job = Job("m", "speed", "ort", "m", DIGEST, 1, PROMPT, 4, asked, str(folder))
    job = msgspec.structs.replace(job, perturbed=perturbed)
    assert job.digest != msgspec.structs.replace(job, perturbed=perturbed + 1).digest
    captioner: Probed = teller  # type: ignore[assignment]
    return answer(job, captioner, 0.0)


def test_a_model_that_ignores_the_image_does_not_move(
    cases: tuple[Case, ...], tmp_path: Path
) -> None:
    blind = told(Teller(blind=True), cases, tmp_path, 9).cases
    seeing = told(Teller(blind=False), cases, tmp_path, 9).cases
    judge = Judge(cases, seeing)
    own, base = judge.judge(blind), judge.judge(seeing)
    for name, found in robustness_figures(own, base, judge).items():
        assert found.changed.value == 0, name
        assert found.flipped == 0
        assert found.difference is not None
        assert found.difference.value == -1, "the reference's number changes with every pixel"
    for found in robustness_figures(base, base, judge).values():
        assert found.changed.value == 1
        assert found.flipped == 4, "another measurement is a flip"
        assert found.difference is None


def test_so_many_cases_are_perturbed_spread_over_all(
    cases: tuple[Case, ...], tmp_path: Path
) -> None:
    said = told(Teller(blind=False), cases, tmp_path, 2).cases
    assert [sorted(c.perturbed) for c in said] == [sorted(NAMES), [], sorted(NAMES), []]
    assert all(not c.perturbed for c in told(Teller(blind=False), cases, tmp_path, 0).cases)


def results(moved: Sequence[bool]) -> list[CaseResult]:
    """Each caption says 5 mm; moved ones lose their effusion under noise, nothing else changes."""
    clean = "CT with a 5 mm nodule. Pleural effusion."
    return [
        CaseResult(
            f"c{i}", clean, [1], True, 1, 0.0, 0.0, 0.0, [],
            perturbed=dict.fromkeys(NAMES, clean) | ({"noise": clean[:23]} if m else {}),
        )
        for i, m in enumerate(moved)
    ]  # fmt: skip


def figures(own: Sequence[bool], base: Sequence[bool], per_patient: int) -> dict[str, Robustness]:
    cases = [
        Case(f"c{i}", Path(f"{i}.png"), f"p{i // per_patient}", "ct", None) for i in range(len(own))
    ]
    judge = Judge(cases, results(base))
    return robustness_figures(judge.judge(results(own)), judge.judge(results(base)), judge)


def test_figures_of_a_pair_of_results_by_hand() -> None:
    # Of 40 images the candidate moves on 9, the reference on 4; 3 of them both: 6 gained, 1 lost.
    own = [True] * 9 + [False] * 31
    base = [True] * 3 + [False] * 6 + [True] + [False] * 30
    found = figures(own, base, 1)
    noise = found["noise"]
    assert noise.flipped == 0, "a lost finding is no flip"
    assert noise.changed.value == 9 / 40
    exact = stats.binomtest(9, 40).proportion_ci(0.95, "exact")
    assert noise.changed.low == pytest.approx(exact.low)
    assert noise.changed.high == pytest.approx(exact.high)
    assert noise.difference is not None
    assert noise.difference.value == pytest.approx(5 / 40)
    for bound, z in ((noise.difference.low, 1.959964), (noise.difference.high, -1.959964)):
        assert bound is not None
        assert float(tango_score(6, 1, 40, bound)) == pytest.approx(z, abs=1e-4)
    # Without discordant pairs Tango's bound is z^2 / (n + z^2).
    still = found["jpeg-60"].difference
    assert still is not None
    assert (still.value, still.images, still.patients) == (0, 40, 40)
    assert still.high == pytest.approx(1.959964**2 / (40 + 1.959964**2), abs=1e-5)


def test_alike_images_of_one_patient_count_less() -> None:
    own, base = [True] * 8 + [False] * 32, [False] * 40
    alone, together = figures(own, base, 1)["noise"], figures(own, base, 4)["noise"]
    assert alone.changed.value == together.changed.value
    for one, other in ((alone.changed, together.changed), (alone.difference, together.difference)):
        assert one is not None
        assert other is not None
        assert one.high is not None
        assert other.high is not None
        assert other.high > one.high + 0.03
        assert (one.patients, other.patients) == (40, 10)


@pytest.fixture(scope="module")
def comparison(
    models: Models, cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    candidates = [Candidate("fp16", models.fp16), Candidate("wrong", models.other)]
    plan = Plan(SpeedPlan(seconds=0.0), noise_floor=False, perturbed=2)
    work = tmp_path_factory.mktemp("work")
    return compare_models(candidates, cases, PROMPT, 8, work, threads=1, plan=plan)


def test_a_comparison_asks_every_model_about_the_same_changed_images(
    comparison: Comparison, models: Models, cases: tuple[Case, ...]
) -> None:
    from exporter.runtimes.images import open_image
    from exporter.runtimes.ort import OrtCaptioner

    model = OrtCaptioner(models.other, threads=1)
    assert [bool(c.captions["wrong"].perturbed) for c in comparison.cases] == [True, False] * 2
    row = comparison.cases[2]
    for p in PERTURBATIONS:
        image = perturb(open_image(cases[2].image), p, row.sha256)
        assert row.captions["wrong"].perturbed[p.name] == model.caption(image, PROMPT, 8).text
    found = comparison.row("wrong").robustness
    assert list(found) == NAMES
    assert {f.changed.images for f in found.values()} == {2}
    assert all(f.difference is None for f in comparison.row("fp16").robustness.values())
    assert not any("robust" in q.name for g in comparison.gates for q in g.quantities)


def test_it_is_in_every_output_and_only_when_asked(comparison: Comparison, tmp_path: Path) -> None:
    write_reports(comparison, tmp_path, {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index('id="slices"') < page.index('id="robustness"') < page.index('id="speed"')
    assert "not gated" in page
    shown = " ".join(comparison_table(comparison).split())
    assert "wrong on perturbed images, facts changed minus reference: noise" in shown
    assert "(2 images, 2 patients; not gated)" in shown
    assert read_comparison(tmp_path / "compare.json").rows == comparison.rows
    # A report of a version without it is still read.
    old = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    for row in old["rows"]:
        del row["robustness"]
    (tmp_path / "compare.json").write_text(json.dumps(old), encoding="utf-8")
    read = read_comparison(tmp_path / "compare.json")
    assert all(row.robustness == {} for row in read.rows)
    write_reports(replace_method(read), tmp_path, {})
    assert 'id="robustness"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "perturbed" not in comparison_table(read)


def replace_method(comparison: Comparison) -> Comparison:
    method = {k: v for k, v in comparison.method.items() if k != "robustness"}
    return msgspec.structs.replace(comparison, method=method)
