"""A machine with TensorRT and a GPU, made of the stand-ins, and a bundle for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.bundle.manifest import Lineage, Source, Usage
from exporter.bundle.package import BundleParts, package
from exporter.engines.build import BuildRequest, EngineReport, build_on
from exporter.engines.options import EngineOptions
from exporter.engines.profiles import read_profiles
from exporter.graphs.export import Compute, export_model
from exporter.runtimes import trt_driver
from tests.support.fake_cuda import FakeLibcuda
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.host_memory import FACTS, HostMemory

PROMPT, TOKENS = "Describe this medical image.", 12


@dataclass(frozen=True)
class Site:
    """The stand-ins in place of library and driver."""

    memory: HostMemory
    trt: FakeTensorRT
    cuda: FakeLibcuda


def install(patch: pytest.MonkeyPatch, *, version: str = "10.16.1.11") -> Site:
    """Make ``import tensorrt`` and the driver's library give the stand-ins."""
    memory = HostMemory(FACTS)
    site = Site(memory, FakeTensorRT(memory, version), FakeLibcuda(memory))
    patch.setitem(sys.modules, "tensorrt", site.trt)
    patch.setattr(trt_driver, "open_driver", lambda: site.cuda)
    patch.setattr(trt_driver, "driver_version", lambda: FACTS.driver)
    return site


def write_standard(source: Path, out: Path) -> Path:
    """Export a model folder as published in the standard dialect; returns the folder with export.json
    and model/.
    """
    merged = out.with_name(f"{out.name}-merged")
    merged.mkdir(parents=True)
    merge_adapters(source, [], merged)
    return export_standard(merged, out)


def export_standard(merged: Path, out: Path, compute: Compute = "float32") -> Path:
    """Export a merged or quantized folder in the standard dialect."""
    out.mkdir(parents=True)
    export_model(merged, out, dialect="standard", float_storage="float16", compute=compute)
    return out


def build_there(
    trt: FakeTensorRT, exported: Path, out: Path, options: EngineOptions | None = None
) -> EngineReport:
    """Engines of an exported folder, without the driver's stand-in."""
    profiles = read_profiles(exported / "export.json")
    request = BuildRequest(
        trt, trt._memory.facts, exported / "model", profiles, options or EngineOptions()
    )
    return build_on(request, out)


def write_bundle(exported: Path, out: Path) -> Path:
    """An unsigned bundle with the optimization profiles in reports/."""
    out.mkdir()
    parts = BundleParts(
        name="tiny",
        exported=exported,
        scheme="fp16",
        target="gpu",
        usage=Usage(family="idefics3", prompt=PROMPT, max_new_tokens=TOKENS),
        lineage=Lineage(base=Source(name="tiny", sha256="0" * 64)),
        tools={},
        checks={},
        statement="",
        reports={"export.json": exported / "export.json"},
    )
    package(out, parts)
    return out


def pictures() -> list[Image.Image]:
    """Noise that is split into tiles, that is not, and that is wide."""
    random = np.random.default_rng(5)
    sizes = [(48, 70, 3), (20, 20, 3), (9, 200, 3)]
    return [Image.fromarray(random.integers(0, 256, s, dtype=np.uint8)) for s in sizes]
