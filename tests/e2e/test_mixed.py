"""The mixed scheme through the command line: plan, refusals, and one build with its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.bundle.verify import verify_bundle
from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.pipeline.build import build_bundle
from tests.e2e.conftest import demo_request
from tests.support.reporting import Recorder

PLAN = ["plan", "--model", "demo", "--scheme", "mixed"]


def one_line(capsys: pytest.CaptureFixture[str], args: list[str], code: int) -> str:
    capsys.readouterr()
    assert run(args) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("medexport: ")]
    assert len(lines) == 1
    return lines[0]


def test_plan_says_what_is_measured_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--max-size", "1MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mixed"]
    assert found["least_bytes"] < found["limit"] == 1_000_000 < found["uniform_bytes"]
    # Four units in each of four blocks, head, embedding, three blocks of the tower, projection.
    assert (found["units"], found["measured"]) == (22, 44)
    # Blocks i.. for a unit of block i; all four for the embedding and for the vision part.
    assert found["block_passes"] == 2 * (4 * (4 + 3 + 2 + 1) + 4 + 4 * 4)
    assert found["vision_passes"] == 8


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-size", "0.2"], 3, ("--max-size 0.2", "allow at least that")),
        (["--max-size", "800KB"], 3, ("0.80 MB", "0.87 MB")),
        (["--max-size", "many"], 2, ("'many'", "300MB")),
        (["--max-kl", "-1"], 2, ("--max-kl -1", "above 0")),
    ],
)
def test_budgets_that_cannot_be_met(
    capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: tuple[str, ...]
) -> None:
    line = one_line(capsys, [*PLAN, *options], code)
    for word in words:
        assert word in line


def test_a_budget_needs_the_mixed_scheme(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["build", "--model", "demo", "--int8", "--max-size", "0.3", "--out", str(tmp_path / "b")]
    assert "--scheme mixed" in one_line(capsys, args, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_build_keeps_what_it_measured(tmp_path: Path) -> None:
    request = demo_request(
        tmp_path, scheme="mixed", max_size="0.36", calibration_samples=12, limit=4
    )
    result = build_bundle(request, Recorder())
    verify_bundle(result.bundle)
    allocation = result.manifest.allocation
    assert allocation is not None
    assert allocation["bytes"] <= allocation["budget"]["bytes"] < 0.36 * 3_100_000
    assert len({unit["bits"] for unit in allocation["units"]}) > 1
    bits = {row["name"]: row["bits"] for row in result.manifest.layers}
    for unit in allocation["units"]:
        assert {bits.get(name, 16) for name in unit["tensors"]} == {unit["bits"]}
    curve = json.loads((result.bundle / "reports" / "tradeoff.json").read_text())
    report = (result.bundle / "reports" / "report.html").read_text()
    assert "<svg" in report and "Bytes against quality" in report
    for point in curve["points"]:
        assert point["label"] in report
    # The weights' own KL is of the size that the comparison sees on other images.
    row = (
        next(r for r in result.comparison.rows if r.name == "mixed") if result.comparison else None
    )
    assert row is not None and row.distribution is not None
    assert 0 < allocation["measured_kl"] < 100 * row.distribution.kl_mean


@pytest.mark.slow
def test_quantize_alone(tmp_path: Path) -> None:
    source = data_root("profiles") / "demo" / "model"
    out = tmp_path / "quantized"
    args = ["quantize", str(source), "--scheme", "mixed", "--max-kl", "0.001"]
    assert run([*args, "--calibration-samples", "8", "--threads", "1", "--out", str(out)]) == 0
    allocation = json.loads((out / "quantization.json").read_text())["allocation"]
    assert 0 < allocation["measured_kl"] <= 0.001
    assert allocation["bytes"] < 0.6 * allocation["float16_bytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["quantized"]
