"""`medexport check` and `medexport score` on small models and files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from exporter.catalog.schema import Gate
from exporter.compare import process
from exporter.compare.candidates import Candidate
from exporter.compare.check import BASELINE, NEW, Question, baseline_row, check_bundles
from exporter.compare.compare import Plan, compare_models, read_comparison, write_reports
from exporter.compare.jobs import read_result
from exporter.compare.quality.rouge import rouge1
from exporter.compare.score import read_predictions, score_predictions
from exporter.compare.speed import SpeedPlan
from exporter.core.cases import Case
from exporter.core.errors import InputRefused, WrongUsage
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from tests.unit.compare.conftest import PROMPT, Models

GATE = Gate()
TOKENS = 6


def question(cases: tuple[Case, ...], prompt: str = PROMPT) -> Question:
    return Question(cases, prompt, TOKENS, 1)


@pytest.fixture(scope="module")
def released(
    models: Models, cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The reports of a comparison as a bundle keeps them."""
    folder = tmp_path_factory.mktemp("released")
    plan = Plan(SpeedPlan(seconds=0.0), noise_floor=False)
    candidates = [Candidate("fp16", models.fp16), Candidate("int8", models.int8)]
    found = compare_models(candidates, cases, PROMPT, TOKENS, folder / "work", threads=1, plan=plan)
    assert [g.candidate for g in found.gates] == ["int8"]
    write_reports(found, folder, {})
    return folder / "compare.json"


def test_a_model_changed_under_the_same_name_is_measured_again(
    models: Models, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    folder, asked = tmp_path / "model", question(cases[:2])

    def check() -> float:
        report = check_bundles(folder, models.fp16, asked, tmp_path / "work", gate=GATE)
        assert (report.candidate, report.reference, report.smoke) == (NEW, BASELINE, True)
        return report.quantity("distribution").value

    shutil.copytree(models.int8, folder)
    honest = check()
    shutil.rmtree(folder)
    shutil.copytree(models.other, folder)
    assert check() > 10 * honest
    shutil.rmtree(folder)
    shutil.copytree(models.int8, folder)
    assert check() == pytest.approx(honest, rel=1e-3)


def test_against_a_report_no_reference_is_run(
    models: Models, cases: tuple[Case, ...], released: Path, tmp_path: Path
) -> None:
    assert baseline_row(read_comparison(released)) == "int8"
    same = check_bundles(models.int8, released, question(cases), tmp_path / "same", gate=GATE)
    assert same.not_measured["distribution"].startswith("no logits")
    assert (same.quantity("flips").value, same.quantity("length").value) == (0, 1)
    assert same.quantity("tokenizer").verdict == "PASS"
    assert same.quantity("image use").images == 4
    other = check_bundles(models.other, released, question(cases), tmp_path / "other", gate=GATE)
    assert other.not_measured == same.not_measured
    result = read_result(tmp_path / "other" / NEW / "result.json")
    assert result is not None
    captioner = OrtCaptioner(models.other, threads=1)
    for case, row in zip(cases, result.cases, strict=True):
        said = captioner.caption(open_image(case.image), PROMPT, TOKENS)
        assert (row.tokens, row.text) == (list(said.tokens), said.text)
    floor = check_bundles(
        models.fp16, released, question(cases), tmp_path / "fp16", gate=GATE, row="fp16"
    )
    assert (floor.quantity("ROUGE-1").value, floor.quantity("flips").value) == (0, 0)


def test_a_finished_check_starts_no_process_again(
    models: Models,
    cases: tuple[Case, ...],
    released: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = check_bundles(models.int8, released, question(cases), tmp_path, gate=GATE)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process.subprocess, "Popen", refuse)
    assert check_bundles(models.int8, released, question(cases), tmp_path, gate=GATE) == first
    changed = tmp_path / "changed"
    shutil.copytree(models.int8, changed)
    (changed / "config.json").write_bytes((changed / "config.json").read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="process was started"):
        check_bundles(changed, released, question(cases), tmp_path, gate=GATE)


def test_a_report_of_other_questions_is_refused(
    models: Models, cases: tuple[Case, ...], released: Path, tmp_path: Path
) -> None:
    def check(asked: Question, report: Path = released, row: str | None = None) -> None:
        check_bundles(models.int8, report, asked, tmp_path, gate=GATE, row=row)

    with pytest.raises(InputRefused, match="ask the same"):
        check(question(cases, "Another prompt."))
    with pytest.raises(WrongUsage, match="no row 'int4'; expected one of fp16, int8"):
        check(question(cases), row="int4")
    with pytest.raises(InputRefused, match="is not in"):
        check(question((replace(cases[0], id="unknown"),)))
    with pytest.raises(InputRefused, match="is another image in"):
        check(question((replace(cases[0], image=cases[1].image),)))
    alone = tmp_path / "compare.json"
    shutil.copyfile(released, alone)
    with pytest.raises(InputRefused, match="belongs beside compare.json"):
        check(question(cases), alone)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_predictions_alone(cases: tuple[Case, ...], tmp_path: Path) -> None:
    truth = cases[0].caption or ""
    other = "CT with a 10 mm nodule in the right lung."
    path = write(
        tmp_path / "p.jsonl",
        {"id": "c0", "caption": truth, "extra": 1},
        {"id": "c1", "caption": other},
        {"id": "mine", "caption": "MRI.", "truth": "MRI of the brain.", "patient": "p0"},
    )
    scores = score_predictions(read_predictions(path), cases)
    assert (scores.images, scores.patients, scores.missing) == (3, 1, 2)
    expected = [1.0, rouge1(cases[1].caption or "", other), rouge1("MRI of the brain.", "MRI.")]
    assert scores.rouge1.value == pytest.approx(sum(expected) / 3)
    assert scores.truth is not None
    assert scores.truth.by_kind["laterality"] == (1, 2)
    assert scores.truth.by_kind["modality"] == (3, 3)
    json.dumps(msgspec.to_builtins(scores), allow_nan=False)


def test_wrong_predictions_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = {"id": "a", "caption": "x"}
    for lines, words in (
        ((good, {"id": "b"}), "line 2"),
        ((good, good), "line 2: id 'a' stands there twice"),
        ((), "no predictions"),
        (([],), "line 1"),
    ):
        with pytest.raises(InputRefused, match=words):
            read_predictions(write(path, *lines))
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputRefused, match="line 1"):
        read_predictions(path)
    with pytest.raises(InputRefused, match="expected JSON lines"):
        read_predictions(tmp_path / "none")
    with pytest.raises(InputRefused, match="prediction 'a': no ground truth"):
        score_predictions(read_predictions(write(path, good)))
