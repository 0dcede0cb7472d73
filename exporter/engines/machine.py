"""TensorRT and the GPU of this machine, together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from exporter.runtimes.trt_api import load_tensorrt
from exporter.runtimes.trt_driver import CudaDriver
from exporter.runtimes.trt_memory import DeviceFacts, DeviceMemory


@dataclass(frozen=True)
class Machine:
    """The module ``tensorrt`` and the first GPU."""

    trt: ModuleType
    memory: DeviceMemory


@contextmanager
def this_machine() -> Iterator[Machine]:
    """TensorRT and the GPU. Raises `EnvironmentLacks` when one of them is missing."""
    trt = load_tensorrt()
    memory = CudaDriver()
    try:
        yield Machine(trt, memory)
    finally:
        memory.close()


def site_folder(bundle: Path, device: DeviceFacts) -> Path:
    """Where engines that a site builds lie: beside the bundle, never in it.

    A bundle is signed and `medexport verify` takes no file that its manifest does not list; an engine
    differs from machine to machine, and from build to build.
    """
    whole = bundle.absolute()
    return whole.with_name(f"{whole.name}.engines") / device.slug


def engine_folder(bundle: Path, device: DeviceFacts) -> Path:
    """The site's engines where there are any, else those that came with the bundle (which need not
    exist).
    """
    packaged = bundle / "model" / "engines" / device.slug
    site = site_folder(bundle, device)
    return packaged if packaged.is_dir() and not site.is_dir() else site
