"""What this machine has: for `medexport doctor` and for error messages."""

from __future__ import annotations

import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporter.core.errors import EnvironmentLacks
from exporter.pipeline.machine import find_gpu, usable_memory
from exporter.pipeline.targets import cpu_flags, this_machine
from exporter.pipeline.tools import tool_versions
from exporter.runtimes.ort_cuda import require_working
from exporter.runtimes.providers import BESIDE, CUDA, both_installed
from exporter.runtimes.threads import usable_cores
from exporter.runtimes.trt_api import available

# Modules that an extra of pyproject.toml brings, and what they are for.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "build": (("torch", "transformers", "peft", "onnx"), "merge, export, parity, compare"),
    "sign": (("cryptography",), "keygen, signing and checking signatures"),
    "gpu": (
        ("onnxruntime",),
        "onnxruntime with CUDA (replaces the CPU package); not run on hardware so far",
    ),
    "tensorrt": (("tensorrt",), "TensorRT engines; not run on hardware so far"),
    "dicom": (("pydicom",), "DICOM images"),
    "metrics": (
        ("medcat",),
        "UMLS concepts from a MedCAT pack; the other metrics need build alone",
    ),
}
INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def examine() -> dict[str, Any]:
    """Findings as a JSON-able mapping with `machine`, `tools`, `providers` and `extras`."""
    import onnxruntime

    providers = list(onnxruntime.get_available_providers())
    flags = [f for f in INTERESTING if f in cpu_flags()]
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "target": this_machine(),
        "processor features": " ".join(flags) or "none listed",
        "usable cores": usable_cores(),
        "memory": f"{usable_memory() / 1e9:.1f} GB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
        "onnxruntime providers": ", ".join(providers),
        "GPU": _gpu(providers),
        "TensorRT": _tensorrt(),
    }
    return {
        "machine": machine,
        "tools": tool_versions(),
        "providers": providers,
        "extras": [_extra(name, *row, providers) for name, row in EXTRAS.items()],
    }


def _extra(name: str, modules: tuple[str, ...], adds: str, providers: list[str]) -> dict[str, Any]:
    missing = [m for m in modules if find_spec(m) is None]
    if name == "gpu" and CUDA not in providers:
        missing = ["onnxruntime-gpu"]
    if name == "gpu" and find_spec("pynvml") is None:
        missing.append("nvidia-ml-py")
    return {"extra": name, "missing": missing, "adds": adds}


def _gpu(providers: list[str]) -> str:
    gpu = find_gpu()
    name = f"{gpu.name}, {gpu.memory / 1e9:.1f} GB" if gpu else "none by the driver"
    usable = _provider() if CUDA in providers else BESIDE if both_installed() else "none usable"
    return f"{name}; {usable}"


def _provider() -> str:
    """Whether the CUDA provider can be used, which being listed does not say."""
    import onnxruntime

    try:
        require_working(onnxruntime)
    except EnvironmentLacks as error:
        return str(error)
    return "CUDA provider works"


def _tensorrt() -> str:
    try:
        found = available() or "not installed"
    except EnvironmentLacks as error:  # installed, but it cannot be used
        found = str(error)
    return f"{found}; engines: not run on hardware so far"
