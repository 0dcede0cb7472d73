"""The deployed side: a bundle runs without torch, without network, and in a folder of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.pipeline.build import BuildResult
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner

# Importing any of these, or opening a socket, ends the program.
GUARD = """
import socket, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "onnx", "safetensors"}:
            raise SystemExit(f"imported {name}")
sys.meta_path.insert(0, Guard())
def refuse(*_, **__): raise SystemExit("opened a socket")
socket.socket = refuse
from exporter.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def images() -> list[Path]:
    return sorted((data_root("calibration") / "phantoms-eval" / "images").iterdir())[:3]


def medexport(*args: object, cwd: Path) -> str:
    command = [sys.executable, "-c", GUARD, *map(str, args)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_verify_and_run_need_no_torch_and_no_network(
    demo_build: BuildResult, tmp_path: Path, images: list[Path]
) -> None:
    bundle = Path(shutil.copytree(demo_build.bundle, tmp_path / "elsewhere"))
    assert "all as packaged" in medexport("verify", bundle, cwd=tmp_path)
    found = json.loads(medexport("run", bundle, *images, "--json", cwd=tmp_path))
    captioner = OrtCaptioner(demo_build.bundle / "model", threads=1)
    for path, row in zip(images, found["results"], strict=True):
        expected = captioner.caption(open_image(path), found["prompt"], 64)
        assert row["caption"] == expected.text
        assert row["tokens"] == list(expected.tokens)
        assert row["stopped"]


def test_run_prints_the_caption_and_nothing_else(
    demo_build: BuildResult, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(demo_build.bundle), str(images[0])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1
    assert out.endswith(".\n")


def test_build_is_reproducible(demo_build: BuildResult, tmp_path: Path) -> None:
    """From nothing, in another folder: every file that holds no measured time is the same."""
    from exporter.pipeline.build import build_bundle
    from tests.e2e.conftest import demo_request
    from tests.support.reporting import Recorder

    again = build_bundle(demo_request(tmp_path, compare=False), Recorder())
    twice = build_bundle(demo_request(tmp_path, compare=False, out=tmp_path / "twice" / "bundle"), Recorder())  # fmt: skip
    assert again.manifest == twice.manifest
    for path in (p for p in again.bundle.rglob("*") if p.is_file()):
        assert path.read_bytes() == (twice.bundle / path.relative_to(again.bundle)).read_bytes()
    files = {f.path: f.sha256 for f in demo_build.manifest.files if f.path.startswith("model/")}
    assert files == {f.path: f.sha256 for f in again.manifest.files if f.path.startswith("model/")}


def test_the_manifest_accounts_for_every_matrix(demo_build: BuildResult) -> None:
    manifest = demo_build.manifest
    from exporter.core.tensors import Checkpoint

    names = set(Checkpoint.open(data_root("profiles") / "demo" / "model").tensors)
    assert {x["name"] for x in (*manifest.layers, *manifest.floats)} == names
    decoder = [x for x in manifest.layers if ".text_model.layers." in x["name"]]
    assert {x["bits"] for x in decoder} == {4}
    assert len(decoder) == 4 * 7
    assert all(x["reason"] for x in manifest.floats)
    assert manifest.lineage.adapters[0].name == "adapter"
    assert manifest.lineage.evaluation is not None
