"""Stages: finished or not there, reused only for the same inputs, made again when touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.core.progress import Progress
from exporter.pipeline.stage import Artifact, Stages
from tests.support.reporting import Recorder


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path / "work", Recorder())


def write(text: str):
    def make(folder: Path, progress: Progress) -> None:
        progress(1, 1, "x")
        (folder / "result").write_text(text)

    return make


def run(stages: Stages, text: str = "a", **changes: object) -> Artifact:
    inputs = {"version": 1, "parents": ["p"], "options": {"bits": 4}} | changes
    return stages.run("quantize", write(text), **inputs)  # type: ignore[arg-type]


def test_a_finished_stage_is_reused(stages: Stages) -> None:
    first = run(stages, "a")
    again = run(stages, "never written")
    assert again == first and (again.path / "result").read_text() == "a"
    assert isinstance(stages.reporter, Recorder)
    assert stages.reporter.stages == [("quantize", False), ("quantize", True)]


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"parents": ["q"]}, {"options": {"bits": 8}}, {"options": {}}]
)
def test_any_other_input_makes_it_anew(stages: Stages, change: dict[str, object]) -> None:
    first = run(stages, "a")
    other = run(stages, "b", **change)
    assert other.key != first.key and (other.path / "result").read_text() == "b"


def test_another_tool_version_makes_it_anew(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(stages, "a")
    monkeypatch.setattr("exporter.pipeline.stage.tool_versions", lambda: {"torch": "other"})
    assert run(stages, "b").key != first.key


def test_without_resume_it_is_made_again(stages: Stages) -> None:
    run(stages, "a")
    stages.resume = False
    assert (run(stages, "b").path / "result").read_text() == "b"


@pytest.mark.parametrize("damage", ["edit", "remove", "add", "seal"])
def test_a_touched_artifact_is_made_again(stages: Stages, damage: str) -> None:
    first = run(stages, "a")
    if damage == "edit":
        (first.path / "result").write_text("z")
        os.utime(first.path / "result", ns=(1, 1))
    elif damage == "remove":
        (first.path / "result").unlink()
    elif damage == "add":
        (first.path / "more").write_text("")
    else:
        first.path.with_name(first.path.name + ".json").unlink()
    assert (run(stages, "b").path / "result").read_text() == "b"


def test_a_failing_stage_leaves_nothing(stages: Stages) -> None:
    def fail(folder: Path, progress: Progress) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stages.run("quantize", fail, version=1, parents=["p"], options={"bits": 4})
    assert list(stages.work.iterdir()) == []
    assert (run(stages, "a").path / "result").read_text() == "a"


def test_leftovers_of_a_killed_run_are_cleared(stages: Stages) -> None:
    first = run(stages, "a")
    first.path.rename(first.path.with_name(f".{first.path.name}.partial"))
    assert (run(stages, "b").path / "result").read_text() == "b"
    assert sorted(p.name for p in stages.work.iterdir()) == [
        first.path.name,
        f"{first.path.name}.json",
    ]
