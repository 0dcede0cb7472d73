"""SIGKILL in the middle of any stage loses at most that stage, and the result is the same."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

from exporter.bundle.verify import verify_bundle
from exporter.pipeline.build import BuildResult, build_bundle
from tests.e2e.conftest import demo_request
from tests.support.reporting import Killer, Recorder

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
