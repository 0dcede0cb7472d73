"""benchmarks/gpu.py as it runs where there is no GPU: to the end, with reasons for what it skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from exporter.catalog.profiles import find_model
from exporter.families.shapes.find import shape_of
from exporter.pipeline.fit_sizes import token_bytes
from exporter.quantizers.schemes import find_scheme

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run(
        out, "--device", "cpu", "--models", "demo", "--precisions", "int4",
        "--runtimes", "onnxruntime,tensorrt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_file_says_when_on_what_and_with_what(smoke: tuple[str, dict[str, object]]) -> None:
    _, found = smoke
    assert found["schema"] == 1
    assert str(found["date"]).startswith("20")
    assert found["device"] == "cpu"
    versions = found["versions"]
    assert isinstance(versions, dict)
    assert {"onnxruntime", "onnx", "numpy"} <= versions.keys()


def test_a_row_has_its_figures_and_its_share_of_the_roofline(
    smoke: tuple[str, dict[str, object]],
) -> None:
    table, found = smoke
    rows = found["rows"]
    assert isinstance(rows, list)
    row, skipped = rows
    assert (row["model"], row["runtime"], row["precision"]) == ("demo", "onnxruntime", "int4")
    assert 0 < row["vision_ms"] < row["first_token_ms"]
    assert row["tokens_per_s"] == pytest.approx(1000 / row["token_ms"])
    assert row["peak_rss"] > 10e6
    assert row["gpu"] == {}
    shape = shape_of(find_model("demo"))
    assert shape.decoder is not None
    read = token_bytes(shape, find_scheme("int4-rtn"))
    read += 4 * shape.decoder.cache_values(row["context"])
    limit = row["roofline"]
    assert limit["token_bytes"] == read
    bandwidth = found["bandwidth_gbs"]
    assert isinstance(bandwidth, float)
    assert limit["share"] == pytest.approx(row["tokens_per_s"] * read / bandwidth / 1e9)
    assert f"{row['tokens_per_s']:.1f}" in table
    why = "TensorRT runs on a GPU only" if find_spec("tensorrt") else "not installed: tensorrt"
    assert skipped["skipped"] == why


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_without_a_gpu_every_row_says_why(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "gpu.json"
    done = run(out, "--models", "demo", "--precisions", "fp16", "--runtimes", "torch,onnxruntime")
    assert done.returncode == 5, done.stderr
    assert "0 measured, 2 skipped" in done.stdout
    reasons = {row["runtime"]: row["skipped"] for row in json.loads(out.read_text())["rows"]}
    last = done.stdout.splitlines()[-1]
    assert last == f"nothing was measured; the first reason: {reasons['torch']}"
    assert "--device cuda: torch" in reasons["torch"]
    assert "CUDAExecutionProvider" in reasons["onnxruntime"]


@pytest.mark.gpu
def test_on_a_gpu_something_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run(out, "--models", "demo", "--precisions", "fp16,int4")
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(out.read_text())["rows"] if "skipped" not in row]
    assert rows, done.stdout
    assert all(row["gpu"]["device"] is not None for row in rows)
