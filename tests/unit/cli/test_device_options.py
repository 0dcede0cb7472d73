"""--compute and --device: what they write, what they ask for, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from exporter.bundle.manifest import Lineage, Source, Usage
from exporter.bundle.package import BundleParts, package
from exporter.cli.main import run
from exporter.compare.candidates import Candidate
from exporter.core.data import data_root
from exporter.core.errors import InputRefused
from exporter.graphs.half import halve_export
from exporter.pipeline.compared import _open, _placed
from exporter.runtimes import ort as runtime
from exporter.runtimes.providers import CUDA

NO_CUDA = pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this machine has CUDA")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "merged"
    source = data_root("profiles") / "demo" / "model"
    assert run(["merge", str(source), "--no-prove", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(merged: Path) -> Path:
    out = merged.parent / "half"
    code = run(["export", str(merged), "--compute", "float16", "--out", str(out)])
    assert code == 0
    return out


@pytest.fixture(scope="module")
def bundle(exported: Path) -> Path:
    usage = Usage(family="idefics3", prompt="Describe the image.", max_new_tokens=8)
    lineage = Lineage(base=Source(name="demo", sha256="0" * 64))
    out = exported.parent / "bundle"
    package(
        out,
        BundleParts(
            name="demo", exported=exported, scheme="fp16", target="h100", usage=usage,
            lineage=lineage, tools={}, checks={}, statement="test",
        ),
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def image(exported: Path) -> Path:
    path = exported.parent / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_an_export_says_its_arithmetic(exported: Path, merged: Path, tmp_path: Path) -> None:
    assert json.loads((exported / "export.json").read_text())["compute"] == "float16"
    decoder = exported / "model" / "onnx" / "decoder_model_merged.onnx"
    session = ort.InferenceSession(str(decoder), providers=["CPUExecutionProvider"])
    kinds = {i.type for i in session.get_inputs() if i.name.startswith("past_")}
    assert kinds == {"tensor(float16)"}
    # The same as turning a float32 export afterwards, byte for byte.
    assert run(["export", str(merged), "--out", str(tmp_path / "plain")]) == 0
    halve_export(tmp_path / "plain")
    files = sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_float16_and_float32_exclude_each_other(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run(["export", str(merged), "--compute", "float16", "--float32", "--out", str(out)])
    assert code == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not out.exists()


@NO_CUDA
def test_run_on_a_gpu_that_is_not_there(
    bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(bundle), str(image), "--device", "cuda"]) == 5
    shown = capsys.readouterr()
    assert "medexport[gpu]" in shown.err
    assert shown.out == "", "no caption from the CPU instead"
    assert run(["run", str(bundle), str(image), "--threads", "1"]) == 0
    assert capsys.readouterr().out.strip()


def test_run_hands_the_device_over(
    bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Captioner(runtime.OrtCaptioner):
        def __init__(self, model_dir: Path, *, threads: int | None, device: Any) -> None:
            asked.append(device)
            super().__init__(model_dir, threads=1)

    monkeypatch.setattr(runtime, "OrtCaptioner", Captioner)
    assert run(["run", str(bundle), str(image), "--device", "cuda"]) == 0
    assert run(["run", str(bundle), str(image)]) == 0
    assert asked == ["cuda", "cpu"]


def test_engines_and_the_cuda_provider_exclude_each_other(
    bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--device cuda falls back to nothing, and engines that are refused fall back to the CPU."""
    code = run(["run", str(bundle), str(image), "--device", "cuda", "--runtime", "tensorrt"])
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert "leave out --device cuda, or --runtime tensorrt" in shown.err


@NO_CUDA
def test_compare_on_a_gpu_that_is_not_there(
    merged: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch as the reference, in a process of its own, whose error comes through."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch has a GPU here")
    code = run(
        [
            "compare",
            str(merged),
            str(exported),
            "--limit",
            "1",
            "--threads",
            "1",
            "--device",
            "cuda",
        ]
    )
    assert code == 5
    assert "the reference process of 'merged': --device cuda: torch" in capsys.readouterr().err


def test_a_merged_folder_is_run_by_torch(merged: Path, exported: Path, tmp_path: Path) -> None:
    reference = _open(f"ref={merged}", set()).candidate
    assert (reference.name, reference.runtime, reference.model_dir) == ("ref", "torch", merged)
    assert _open(str(exported), set()).candidate.runtime == "ort"
    shutil.copy(merged / "config.json", tmp_path)
    with pytest.raises(InputRefused, match="a merged folder"):
        _open(str(tmp_path), set())


def test_torch_computes_in_float16_on_a_gpu_only() -> None:
    torch, graphs = Candidate("t", Path(), "torch"), Candidate("o", Path(), "ort")
    said = Candidate("p", Path(), "predictions")
    assert (_placed(torch, "cuda").device, _placed(torch, "cuda").dtype) == ("cuda", "float16")
    assert _placed(torch, "cpu") == torch
    assert (_placed(graphs, "cuda").device, _placed(graphs, "cuda").dtype) == ("cuda", "float32")
    assert _placed(said, "cuda") == said
