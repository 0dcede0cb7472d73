"""A build of each captioner's family through the command line: compared, verified, run without torch.

All rows but two are slow: a build with its comparison takes ten seconds and more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.bundle.manifest import read_manifest
from exporter.cli.main import run
from exporter.core.data import data_root
from tests.e2e.test_deployed import medexport
from tests.support.family_cases import CASES, FamilyCase

SCHEME, IMAGES = "int4-rtn", 2
# One whose image is spliced into the text, and one that sees it by cross-attention.
FAST = {"qwen2_5_vl", "vit-gpt2"}
ROWS = [
    pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize("case", ROWS)
def test_the_command_line_builds_and_compares(
    case: FamilyCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bundle = case.write(tmp_path / "model"), tmp_path / "bundle"
    arguments = ["build", "--model", str(folder), "--scheme", SCHEME, "--limit", str(IMAGES)]
    arguments += ["--threads", "1", "--offline", "--out", str(bundle)]
    assert run(arguments) == 0
    assert f"greedy captions identical to torch on {IMAGES} images" in capsys.readouterr().out

    manifest = read_manifest(bundle)
    assert manifest.usage.task == "caption"
    assert {layer["bits"] for layer in manifest.layers} >= {4}
    assert f"against fp16 on {IMAGES} images" in manifest.checks["comparison"]
    assert (bundle / "reports" / "report.html").is_file()
    check_comparison(json.loads((bundle / "reports" / "compare.json").read_bytes()), case)

    assert run(["verify", str(bundle)]) == 0
    picture = min((data_root("calibration") / "phantoms-eval" / "images").iterdir())
    said = medexport("run", bundle, picture, "--max-new-tokens", 8, "--json", cwd=tmp_path)
    (row,) = json.loads(said)["results"]
    assert 1 <= len(row["tokens"]) <= 8
    assert isinstance(row["caption"], str)


def check_comparison(report: dict[str, Any], case: FamilyCase) -> None:
    """Reference and candidate were both run, and the candidate's weights are not the reference's."""
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() >= {"fp16", SCHEME}
    assert 0 < rows[SCHEME]["distribution"]["kl_mean"] < 2 * case.kl[SCHEME]
    assert SCHEME in {gate["candidate"] for gate in report["gates"]}
