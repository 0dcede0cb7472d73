"""`build --format tensorrt` on a machine without TensorRT, and builds in the standard dialect."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from exporter.bundle.manifest import read_manifest
from exporter.cli.main import run
from exporter.core.data import data_root

DEMO = ["build", "--model", "demo", "--adapter", "demo", "--offline", "--threads", "1"]
NO_TENSORRT = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("standard") / "bundle"
    options = ["--scheme", "int4-rtn", "--symmetric", "--format", "tensorrt", "--no-compare"]
    assert run([*DEMO, *options, "--out", str(out)]) == 0
    return out


def image() -> str:
    return str(min((data_root("calibration") / "phantoms-eval" / "images").iterdir()))


def test_the_bundle_is_ready_for_engines(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.dialect == "standard"
    assert manifest.scheme == "int4-rtn-pos"
    report = json.loads((bundle / "reports" / "export.json").read_bytes())
    assert set(report["standard"]["profiles"]["decoder_model_merged"]) == {"prefill", "decode"}
    four = [layer for layer in manifest.layers if layer["bits"] == 4]
    assert len(four) > 20
    assert not {layer["name"] for layer in four} & set(report["standard"]["widened"])


@NO_TENSORRT
def test_what_is_missing_is_said_and_where_to_get_it(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scheme", "fp16", "--format", "tensorrt", "--no-compare", "--json"]
    assert run([*DEMO, *options, "--out", str(tmp_path / "fp16")]) == 0
    found = json.loads(capsys.readouterr().out)["engines"]
    assert "tensorrt-cu12" in found["none here"]
    assert found["on the target"] == f"medexport engine build {tmp_path / 'fp16'}"
    assert run(["engine", "build", str(bundle)]) == 5
    assert "pypi.nvidia.com" in capsys.readouterr().err


@NO_TENSORRT
def test_a_run_without_engines_falls_back_aloud(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(bundle), image(), "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    assert graph["runtime"] == "onnxruntime"
    assert run(["run", str(bundle), image(), "--runtime", "tensorrt", "--json"]) == 0
    out, err = capsys.readouterr()
    fallen = json.loads(out)
    assert fallen["runtime"] == "onnxruntime"
    assert "tensorrt" in fallen["fallback"]
    assert "not TensorRT but the ONNX graph" in err
    assert fallen["results"][0]["tokens"] == graph["results"][0]["tokens"]


def test_float16_arithmetic_is_compared_with_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Float weights computed in float16 are a candidate of their own, not the reference."""
    options = ["--scheme", "fp16", "--dialect", "standard", "--compute", "float16", "--limit", "2"]
    assert run([*DEMO, *options, "--json", "--out", str(tmp_path / "half")]) == 0
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    half = next(row for row in comparison["rows"] if row["name"] == "fp16-half")
    assert 0 < half["distribution"]["kl_mean"] < 1e-5
    assert [gate["candidate"] for gate in comparison["gates"]].count("fp16-half") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--int8", "--format", "tensorrt", "--dialect", "ort"],
        ["--scheme", "int8-static", "--compute", "float16"],
        ["--scheme", "int4-rtn", "--dialect", "standard"],
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*DEMO, *options, "--out", str(tmp_path / "bundle")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 300
    assert not (tmp_path / "bundle").exists()
