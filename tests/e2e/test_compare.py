"""`medexport compare` as a user calls it: a bundle against another one, and against predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exporter.calibrate.sets import open_set
from exporter.cli.stages import compare
from exporter.core.errors import InputRefused, WrongUsage
from exporter.pipeline.build import BuildResult

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 4
FEW = ("--limit", IMAGES, "--threads", "1")
# A machine with the runtime alone.
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'safetensors', 'peft', 'scipy'):
            raise ImportError(f'{name} is not installed here')
sys.meta_path.insert(0, Block())
from exporter.cli.main import main
sys.argv = ['medexport', *sys.argv[1:]]
main()
"""


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(compare, [str(a) for a in arguments])


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Folder whose predictions are the ground truth."""
    folder = tmp_path / "other-system"
    folder.mkdir()
    samples = open_set("phantoms-eval").samples
    lines = [json.dumps({"id": s.id, "caption": s.caption}) for s in samples]
    (folder / "predictions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_bundle_against_itself_and_predictions(
    demo_build: BuildResult, predictions: Path, tmp_path: Path
) -> None:
    bundle = demo_build.bundle
    out = tmp_path / "compared"
    result = ask(f"old={bundle}", f"new={bundle}", predictions, *FEW, "--json", "--out", out)
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert found["reference"] == "old"
    assert rows["new"]["distribution"]["kl_mean"] == 0
    assert rows["new"]["moved"]["flipped"] == 0
    truth = rows["other-system"]
    assert truth["truth"]["right"] == truth["truth"]["total"] > 0
    assert (truth["distribution"], truth["speed"], truth["parts"]) == (None, None, {})
    assert (out / "report.html").is_file()
    gate = next(g for g in found["gates"] if g["candidate"] == "other-system")
    assert {"distribution", "image use", "truncation"} <= gate["not_measured"].keys()


def test_it_runs_without_the_build_side(demo_build: BuildResult) -> None:
    for command in (
        ["compare", f"a={demo_build.bundle}", f"b={demo_build.bundle}"],
        ["check", str(demo_build.bundle), "--baseline", str(demo_build.bundle)],
    ):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *command, *map(str, FEW)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 4), done.stderr
        assert "INCONCLUSIVE (smoke test)" in done.stdout


def test_what_cannot_be_compared_is_refused(
    demo_build: BuildResult, predictions: Path, tmp_path: Path
) -> None:
    bundle = demo_build.bundle
    assert isinstance(ask(bundle, *FEW).exception, WrongUsage)
    assert isinstance(ask(predictions, bundle, *FEW).exception, WrongUsage)
    (tmp_path / "empty").mkdir()
    refused = ask(bundle, tmp_path / "empty", *FEW).exception
    assert isinstance(refused, InputRefused) and "manifest.json" in str(refused)
    few = tmp_path / "few.jsonl"
    few.write_text('{"id": "eval-00000-0", "caption": "A chest X-ray."}\n', encoding="utf-8")
    refused = ask(bundle, few, *FEW).exception
    assert isinstance(refused, InputRefused) and "no prediction for 3 of 4 cases" in str(refused)
