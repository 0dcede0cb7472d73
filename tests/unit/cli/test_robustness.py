"""`--robustness` on its way from the command line to the plan and the stage's key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from exporter.cli.build import build
from exporter.cli.stages import compare
from exporter.compare import compare as comparing
from exporter.compare.candidates import Candidate
from exporter.pipeline import judge
from exporter.pipeline.evaluation import Evaluation, compare_candidates, open_evaluation


class Seen(Exception):
    """Ends a run where it is looked at."""


def evaluation(robustness: int) -> Evaluation:
    return open_evaluation("phantoms-eval", limit=2, threads=1, robustness=robustness)


@pytest.mark.parametrize("asked", [0, 3])
def test_the_plan_perturbs_as_many_images_as_asked(
    asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: Any, plan: comparing.Plan, **__: Any) -> None:
        assert plan.perturbed == asked
        raise Seen

    monkeypatch.setattr(comparing, "compare_models", look)
    rows = [Candidate("fp16", tmp_path)]
    with pytest.raises(Seen):
        compare_candidates(rows, tmp_path / "out", evaluation(asked), lineage={})


def test_a_finished_comparison_without_it_is_not_taken_for_one_with_it() -> None:
    keys: list[dict[str, Any]] = []

    def run(*_: Any, options: dict[str, Any], **__: Any) -> None:
        keys.append(options)

    plan: Any = SimpleNamespace(
        stages=SimpleNamespace(run=run, work=Path()), schemes={}, lineage_lines=dict
    )
    reference: Any = SimpleNamespace(key="r")
    for asked in (0, 3):
        judge.compare(plan, evaluation(asked), reference, {})
    assert [k["robustness"] for k in keys] == [0, 3]
    assert {**keys[0], "robustness": 3} == keys[1]


def test_compare_hands_the_number_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.pipeline import compared

    asked: list[compared.Asked] = []

    def look(_models: Any, _out: Path, options: compared.Asked, **_: Any) -> None:
        asked.append(options)
        raise Seen

    monkeypatch.setattr(compared, "compare_any", look)
    done = CliRunner().invoke(compare, ["a", "b", "--robustness", "3"])
    assert isinstance(done.exception, Seen)
    assert asked == [compared.Asked(None, robustness=3)]


def test_build_refuses_it_without_a_comparison() -> None:
    options = ["--model", "demo", "--int8", "--no-compare", "--robustness", "2"]
    done = CliRunner().invoke(build, options)
    assert done.exit_code == 2
    assert "--robustness" in done.output
