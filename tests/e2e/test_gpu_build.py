"""`build --compute float16`: a bundle for `run --device cuda`, compared on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest

from exporter.bundle.manifest import read_manifest
from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.core.errors import InputRefused
from exporter.runtimes.onnx_scan import scan_graph
from exporter.runtimes.ort_cuda import ATTENTION, check_graph
from exporter.runtimes.providers import CUDA
from tests.support.tiny_bert import write_tiny_bert

DEMO = ["build", "--model", "demo", "--adapter", "demo", "--offline", "--threads", "1"]
NO_CUDA = pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this machine has CUDA")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, with the work folder of its stages beside it."""
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    options = ["--scheme", "int4-rtn", "--compute", "float16", "--limit", "1"]
    assert run([*DEMO, *options, "--out", str(out)]) == 0
    return out


def image() -> str:
    return str(min((data_root("calibration") / "phantoms-eval" / "images").iterdir()))


def test_its_graphs_are_what_cuda_takes(built: Path) -> None:
    """`check_graph` is what refuses a graph on `--device cuda` before it is loaded."""
    assert read_manifest(built).dialect == "ort"
    operators: set[str] = set()
    for path in sorted((built / "model" / "onnx").glob("*.onnx")):
        facts = scan_graph(path)
        check_graph(facts, path.name)
        operators |= facts.operators.keys()
    assert {ATTENTION, "com.microsoft::MatMulNBits"} <= operators


def test_the_reference_of_its_comparison_still_computes_in_float32(built: Path) -> None:
    refused = 0
    for record in built.with_name("bundle.work").rglob("export.json"):
        if "compute" in json.loads(record.read_text()):
            continue
        decoder = record.parent / "model" / "onnx" / "decoder_model_merged.onnx"
        with pytest.raises(InputRefused, match="--compute float16"):
            check_graph(scan_graph(decoder), decoder.name)
        refused += 1
    assert refused == 2  # the reference and the float32 export that parity starts from


def test_it_was_compared_on_the_cpu_and_says_nearly_the_same(built: Path) -> None:
    found = json.loads((built / "reports" / "compare.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert 1e-5 < rows["int4-rtn"]["distribution"]["kl_mean"] < 1e-2
    parity = json.loads((built / "reports" / "parity.json").read_text())
    assert {check["model"] for check in parity["checks"]} >= {"int4-rtn"}


@NO_CUDA
def test_it_runs_on_the_cpu_and_on_cuda_asks_for_the_gpu_alone(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(built), image()]) == 0
    assert capsys.readouterr().out.strip()
    assert run(["run", str(built), image(), "--device", "cuda"]) == 5
    shown = capsys.readouterr()
    assert "medexport[gpu]" in shown.err and shown.out == ""


def test_models_that_do_not_caption_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_bert(tmp_path / "bert")
    options = ["--scheme", "int8", "--compute", "float16", "--out", str(tmp_path / "out")]
    assert run(["build", "--model", str(folder), "--offline", *options]) == 2
    assert "is for models that caption" in capsys.readouterr().err
    assert not (tmp_path / "out.work").exists()
