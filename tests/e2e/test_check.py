"""`medexport check` and `medexport score` as a user calls them, on the demo bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from exporter.calibrate.sets import open_set
from exporter.cli.check import check, score
from exporter.core.errors import GateInconclusive, InputRefused
from exporter.pipeline.build import BuildResult
from tests.e2e.conftest import CASES

FEW = ("--limit", str(CASES), "--threads", "1")


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(check, [str(a) for a in arguments])


def test_a_bundle_against_its_own_report(demo_build: BuildResult, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    result = ask(demo_build.bundle, *FEW, "--smoke", "--junit", junit, "--json")
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert (found["schema"], found["label"], found["images"]) == (
        1, "INCONCLUSIVE (smoke test)", CASES,
    )  # fmt: skip
    flips = next(q for q in found["quantities"] if q["name"] == "flips")
    assert flips["value"] == 0, "the same bundle on the same machine says the same"
    assert "distribution" in found["not_measured"]
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")


def test_a_bundle_against_another_one_goes_on_where_it_was(
    demo_build: BuildResult, tmp_path: Path
) -> None:
    old = shutil.copytree(demo_build.bundle, tmp_path / "old")
    arguments = (demo_build.bundle, "--baseline", old, *FEW, "--work", tmp_path / "work")
    result = ask(*arguments)
    assert isinstance(result.exception, GateInconclusive), result.output
    assert result.exception.exit_code == 4
    assert "images would decide" in str(result.exception)
    assert result.stdout.startswith("INCONCLUSIVE (smoke test): new against baseline")
    assert "PASS          distribution" in result.stdout
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("result.json")}
    assert len(stamps) == 2
    again = ask(*arguments)
    assert again.stdout == result.stdout
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_changed_bundle_is_refused(demo_build: BuildResult, tmp_path: Path) -> None:
    broken = shutil.copytree(demo_build.bundle, tmp_path / "broken")
    graph = broken / "model" / "onnx" / "embed_tokens.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    for arguments in ((broken,), (demo_build.bundle, "--baseline", broken)):
        assert isinstance(ask(*arguments, *FEW).exception, InputRefused)


@pytest.mark.parametrize("as_json", [False, True])
def test_predictions_of_the_truth_are_all_right(tmp_path: Path, as_json: bool) -> None:
    samples = open_set("phantoms-eval").samples[:30]
    path = tmp_path / "predictions.jsonl"
    lines = [json.dumps({"id": s.id, "caption": s.caption}) for s in samples]
    path.write_text("\n".join(lines), encoding="utf-8")
    arguments = [str(path), "--eval", "phantoms-eval", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(score, arguments)
    assert result.exception is None, result.output
    if as_json:
        found = json.loads(result.stdout)
        assert (found["images"], found["missing"]) == (30, 210)
        assert (found["rouge1"]["value"], found["truth"]["precision"]) == (1, 1)
    else:
        assert result.stdout.startswith("30 predictions, 10 patients, 210 missing")
        assert "facts precision  100.0%" in result.stdout
