"""What `medexport doctor` says of a GPU and of what onnxruntime has for it."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest

from exporter.core.errors import EnvironmentLacks
from exporter.pipeline import doctor
from exporter.pipeline.machine import Gpu
from exporter.runtimes.providers import CPU, CUDA


def found(monkeypatch: pytest.MonkeyPatch, providers: list[str], *, both: bool = False) -> Any:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(doctor, "find_gpu", lambda: Gpu("NVIDIA L4", 24 * 10**9, "8.9"))
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
