"""The deployed side in an environment of its own: the locked runtime packages and the wheel, no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from tests.readers.install import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "requirements-pip.lock", ROOT / "requirements-runtime.lock"
BUILD_SIDE = ("torch", "transformers", "peft", "onnx", "safetensors")
FIND = "import json, sys; from importlib.util import find_spec; print(json.dumps([n for n in sys.argv[1:] if find_spec(n)]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment, filled as the Makefile fills its own; skips without an index."""
    pytest.importorskip("hatchling")
    root = tmp_path_factory.mktemp("runtime")
    wheels = root / "wheels"
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*command, wheels], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    done(sys.executable, "-m", "venv", root / "venv")
    pip = [root / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--quiet", "--no-input", "--no-compile"]
    for lock in LOCKS:
        answer = call(*pip, "--no-deps", "--require-hashes", "--requirement", lock)
        if answer.returncode and any(mark in answer.stderr for mark in OFFLINE):
            last = answer.stderr.strip().splitlines()[-1]
            pytest.skip(f"the package index cannot be reached: {last[:200]}")
        assert answer.returncode == 0, answer.stderr
    done(*pip, "--no-deps", "--no-index", wheel)
    return root / "venv" / "bin"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "demo"
    arguments = ["build", "--model", "demo", "--adapter", "demo", "--scheme", "int4-rtn"]
    assert run([*arguments, "--no-compare", "--offline", "--threads", "1", "--out", str(out)]) == 0
    return out


def call(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run with the environment's own packages alone: no PYTHONPATH."""
    line = ["env", "-u", "PYTHONPATH", *map(str, command)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def done(*command: object, cwd: Path = ROOT) -> str:
    answer = call(*command, cwd=cwd)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_a_bundle_verifies_and_answers(installed: Path, bundle: Path, tmp_path: Path) -> None:
    python, medexport = installed / "python", installed / "medexport"
    assert json.loads(done(python, "-c", FIND, "exporter", *BUILD_SIDE, cwd=tmp_path)) == [
        "exporter"
    ]
    where = done(python, "-c", "import exporter; print(exporter.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)

    assert "all as packaged" in done(medexport, "verify", bundle, cwd=tmp_path)
    images = sorted((data_root("calibration") / "phantoms-eval" / "images").iterdir())[:3]
    said = json.loads(done(medexport, "run", bundle, *images, "--json", cwd=tmp_path))
    captioner = OrtCaptioner(bundle / "model", threads=1)
    for path, row in zip(images, said["results"], strict=True):
        assert row["caption"] == captioner.caption(open_image(path), said["prompt"], 64).text
        assert row["caption"].endswith(".")
