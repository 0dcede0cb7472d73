"""What `medexport doctor` says of a GPU and of what onnxruntime has for it."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest

from exporter.core.errors import EnvironmentLacks
from exporter.pipeline import doctor
from exporter.pipeline.machine import Gpu
from exporter.runtimes.providers import CPU, CUDA

L4 = Gpu("NVIDIA L4", 24 * 10**9, "8.9")


def found(
    monkeypatch: pytest.MonkeyPatch,
    providers: list[str],
    *,
    both: bool = False,
    gpu: Gpu | None = L4,
) -> Any:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(doctor, "find_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "jetson_target", lambda: None)
    monkeypatch.setattr(doctor, "both_installed", lambda: both)
    return doctor.examine()


def extra(examined: Any) -> Any:
    (row,) = (e for e in examined["extras"] if e["extra"] == "gpu")
    return row


def test_a_gpu_without_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = found(monkeypatch, [CPU])
    assert examined["machine"]["GPU"] == "NVIDIA L4, 24.0 GB; none usable"
    assert extra(examined)["missing"][0] == "onnxruntime-gpu"
    assert "not run on hardware" in extra(examined)["adds"]


def test_a_provider_hidden_by_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = found(monkeypatch, [CPU], both=True)
    assert "beside onnxruntime, which hides it" in examined["machine"]["GPU"]


def test_a_listed_provider_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(_: Any) -> None:
        raise EnvironmentLacks("asked for CUDAExecutionProvider, got CPUExecutionProvider")

    monkeypatch.setattr(doctor, "require_working", dead)
    examined = found(monkeypatch, [CUDA, CPU])
    assert examined["machine"]["GPU"].endswith("got CPUExecutionProvider")
    assert "onnxruntime-gpu" not in extra(examined)["missing"]
    monkeypatch.setattr(doctor, "require_working", lambda _: None)
    assert found(monkeypatch, [CUDA, CPU])["machine"]["GPU"].endswith("CUDA provider works")


def test_what_a_gpu_multiplies_in_is_its_profile_s(monkeypatch: pytest.MonkeyPatch) -> None:
    said = found(monkeypatch, [CPU])["machine"]["GPU multiplies in"]
    assert said == "fp32 fp16 bf16 fp8 int8 int4 (l4); weights of fewer bits are unpacked"
    h100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, "9.0")
    said = found(monkeypatch, [CPU], gpu=h100)["machine"]["GPU multiplies in"]
    assert "int8" in said and "int4" not in said
    unknown = Gpu("NVIDIA Test 1000", 8 * 10**9, "8.9")
    machine = found(monkeypatch, [CPU], gpu=unknown)["machine"]
    assert machine["GPU multiplies in"] == "no profile names it"
    assert found(monkeypatch, [CPU], gpu=None)["machine"]["GPU multiplies in"] == "no GPU"


def test_a_tensorrt_too_old_for_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell = Gpu("NVIDIA GeForce RTX 5090", 32 * 10**9, "12.0")
    for version, says in (("10.7.0.23", "needs 10.8 or later"), (None, "(this GPU needs 10.8")):
        monkeypatch.setattr(doctor, "available", lambda version=version: version)
        assert says in found(monkeypatch, [CPU], gpu=blackwell)["machine"]["TensorRT"]
    monkeypatch.setattr(doctor, "available", lambda: "10.8.0.43")
    machine = found(monkeypatch, [CPU], gpu=blackwell)["machine"]
    assert machine["TensorRT"] == "10.8.0.43; engines: not run on hardware so far"
