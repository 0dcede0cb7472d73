"""What this machine has: for `medexport doctor` and for error messages."""

from __future__ import annotations

import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporter.catalog.schema import TargetProfile
from exporter.core.errors import EnvironmentLacks
from exporter.pipeline.machine import find_gpu, gpu_target, jetson_target, usable_memory
from exporter.pipeline.targets import cpu_flags, this_machine
from exporter.pipeline.tools import tool_versions
from exporter.runtimes.ort_cuda import require_working
from exporter.runtimes.providers import BESIDE, CUDA, both_installed
from exporter.runtimes.threads import usable_cores
from exporter.runtimes.trt_api import available, parse_version

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
    gpu = find_gpu()
    target = gpu_target(gpu) if gpu else jetson_target()
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
        "GPU multiplies in": _precisions(target) if gpu or target else "no GPU",
        "TensorRT": _tensorrt(target),
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


def _precisions(target: TargetProfile | None) -> str:
    """Types of its products; 4-bit weights need none of their own."""
    if target is None:
        return "no profile names it"
    return f"{' '.join(target.precisions)} ({target.name}); weights of fewer bits are unpacked"


def _tensorrt(target: TargetProfile | None) -> str:
    least = target.tensorrt.least if target and target.tensorrt else ""
    try:
        version = available()
    except EnvironmentLacks as error:  # installed, but it cannot be used
        found = str(error)
    else:
        found = version or "not installed"
        if version and least and parse_version(version) < parse_version(least):
            found += f", which has no kernels for this GPU: it needs {least} or later"
        elif not version and least:
            found += f" (this GPU needs {least} or later)"
    return f"{found}; engines: not run on hardware so far"
