"""The scratch folder of a calibration belongs to one build."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.calibrate.sets import open_set
from exporter.pipeline.calibrated import claim_scratch, open_calibration


def test_scratch_is_kept_for_the_same_build_and_emptied_for_another(tmp_path: Path) -> None:
    scratch = tmp_path / "deep" / "scratch"
    claim_scratch(scratch, "one")
    (scratch / "blocks").mkdir()
    (scratch / "blocks" / "layer").write_text("x")
    claim_scratch(scratch, "one")
    assert (scratch / "blocks" / "layer").read_text() == "x"
    claim_scratch(scratch, "two")
    assert [p.name for p in scratch.iterdir()] == ["identity.json"]


@pytest.mark.parametrize("samples", [0, 1000])
def test_all_cases_are_drawn_when_there_are_no_more(samples: int) -> None:
    drawn = open_calibration("phantoms-calib", samples, None, None)
    assert {c.id for c in drawn.cases} == {c.id for c in open_set("phantoms-calib").cases()}


def test_another_seed_draws_other_cases_and_is_recorded() -> None:
    first, second = (open_calibration("phantoms-calib", 8, None, None, seed=s) for s in (0, 1))
    assert {c.id for c in first.cases} != {c.id for c in second.cases}
    assert (first.options()["seed"], second.options()["seed"]) == (0, 1)
    assert first.options()["balance"] is True


def test_an_empty_prompt_is_one_and_none_is_the_sets_own() -> None:
    """Models trained without an instruction begin with nothing but their start token."""
    own = open_set("phantoms-calib").prompt
    found = [open_calibration("phantoms-calib", 2, p, None).prompt for p in ("", None, "CT:")]
    assert own and found == ["", own, "CT:"]
