"""SIGKILL in the middle of any stage loses at most that stage, and the result is the same."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from exporter.bundle.verify import verify_bundle
from exporter.pipeline.build import BuildResult, build_bundle
from exporter.pipeline.request import BuildRequest
from tests.e2e.conftest import demo_request
from tests.support.reporting import Killer, Recorder, WordKiller

KILLS = (
    ("resolve", 1, -1),
    ("merge", 1, 3),
    ("export", 1, 3),
    ("quantize", 1, 3),
    ("export", 2, 3),
    ("export", 3, 3),
    ("verify", 1, 1),
    ("compare", 1, 2),
    ("package", 1, -1),
)

# What assembling a calibrated folder stores first.
FIRST_TENSOR = "model.text_model.embed_tokens.weight"


def build_and_die(folder: Path, stage: str, nth: int, step: int) -> None:
    build_bundle(demo_request(folder), Killer(stage, nth, step))


def test_a_build_survives_a_kill_in_every_stage(tmp_path: Path, demo_build: BuildResult) -> None:
    spawn = multiprocessing.get_context("spawn")
    finished: set[str] = set()
    for kill in KILLS:
        child = spawn.Process(target=build_and_die, args=(tmp_path, *kill))
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL, f"not killed in {kill}"
        assert not (tmp_path / "bundle").exists()
        work = tmp_path / "bundle.work"
        now = {p.name for p in work.glob("*.json")} if work.exists() else set()
        assert finished <= now, "a finished stage was lost"
        finished = now
    reporter = Recorder()
    result = build_bundle(demo_request(tmp_path), reporter)
    assert len(reporter.stages) == reporter.expected == len(KILLS)
    assert [cached for name, cached in reporter.stages if name not in ("resolve", "package")] == [
        True
    ] * (len(KILLS) - 2)
    verify_bundle(result.bundle)
    assert model_files(result) == model_files(demo_build)


def calibrated_request(folder: Path) -> BuildRequest:
    return demo_request(folder, scheme="int4-gptq", calibration_samples=4, compare=False)


def calibrate_and_die(folder: Path, word: str) -> None:
    build_bundle(calibrated_request(folder), WordKiller("quantize", word))


def die_at(folder: Path, word: str) -> Path:
    """Build in `folder` until progress says `word`; returns the folder that a resume reads."""
    child = multiprocessing.get_context("spawn").Process(
        target=calibrate_and_die, args=(folder, word)
    )
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    return folder / "bundle.work" / "calibration-int4-gptq.scratch"


def test_a_killed_calibration_goes_on_at_its_block(tmp_path: Path) -> None:
    scratch = die_at(tmp_path / "a", "block 2")
    finished = sorted((scratch / "blocks").glob("*.json"))
    assert [p.stem for p in finished] == ["layer-00000", "layer-00001"]
    # The same build without what the killed one left of its blocks.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "bundle.work" / scratch.name)

    resumed, whole = Recorder(), Recorder()
    first = build_bundle(calibrated_request(tmp_path / "a"), resumed)
    second = build_bundle(calibrated_request(tmp_path / "b"), whole)

    assert resumed.notes["quantize"] == "went on at block 2 of 4"
    assert whole.notes["quantize"] == ""
    assert model_files(first) == model_files(second)
    calibration = first.manifest.lineage.calibration
    assert calibration is not None
    assert calibration.details == {"cases": 4, "seed": 0, "balance": True}
    assert first.manifest.settings["gptq"]["damping"] == 0.01


def test_finished_blocks_are_not_walked_again(tmp_path: Path) -> None:
    scratch = die_at(tmp_path, FIRST_TENSOR)
    assert len(list((scratch / "blocks").glob("*.json"))) == 4
    reporter = Recorder()
    result = build_bundle(calibrated_request(tmp_path), reporter)
    assert reporter.notes["quantize"] == "all 4 blocks were finished"
    assert result.manifest.scheme == "int4-gptq"
    assert not scratch.exists()


def model_files(result: BuildResult) -> dict[str, str]:
    return {f.path: f.sha256 for f in result.manifest.files if not f.path.startswith("reports/")}


@pytest.mark.parametrize("scheme", ["int8"])
def test_another_scheme_reuses_what_does_not_depend_on_it(
    demo_build: BuildResult, tmp_path: Path, scheme: str
) -> None:
    reporter = Recorder()
    request = demo_request(tmp_path, scheme=scheme, work=demo_build.work, compare=False)
    result = build_bundle(request, reporter)
    assert dict(reporter.stages)["merge"] is True
    assert ("quantize", False) in reporter.stages
    assert "Built without comparison and parity" in result.manifest.statement
