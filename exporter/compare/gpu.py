"""What a GPU says of a measured process: memory by NVML and torch, energy by the board's counter.

Each figure is None where nobody says it. Optional: nvidia-ml-py (module pynvml); torch only where it
is loaded anyway.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import msgspec

from exporter.compare.memory import gpu_memory


class GpuUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes, watts and joules of one process on its GPU.

    process: what NVML lists for this process at its end; device: by how much the GPU's used memory
    grew since before the model was loaded, other processes included (containers hide the first);
    allocated, reserved: torch's peaks, tensors and with its cache; watts, joules: mean power and
    energy of the board while captioning; joules_per_token: energy over generated tokens.
    """

    process: int | None = None
    device: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    watts: float | None = None
    joules: float | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True)
class _Reading:
    """Used bytes, millijoules since the driver was loaded, and when that was read."""

    used: int | None
    energy: int | None
    at: float


class GpuMeter:
    """Made before a model is loaded; `begin` before what is timed, `finish` after it."""

    def __init__(self) -> None:
        self._before = _read()
        self._begun = self._before

    def begin(self) -> None:
        """Start counting energy; torch's peaks are of the whole process, loading included."""
        _wait()
        self._begun = _read()

    def finish(self, tokens: int) -> GpuUse:
        """The figures; `tokens` were generated since `begin`."""
        _wait()
        end = _read()
        allocated, reserved = _torch_peaks()
        joules = watts = None
        if end.energy is not None and self._begun.energy is not None:
            joules = (end.energy - self._begun.energy) / 1000
            watts = joules / max(end.at - self._begun.at, 1e-9)
        grown = None
        if end.used is not None and self._before.used is not None:
            grown = max(0, end.used - self._before.used)
        return GpuUse(
            process=gpu_memory(),
            device=grown,
            allocated=allocated,
            reserved=reserved,
            watts=watts,
            joules=joules,
            joules_per_token=joules / tokens if joules is not None and tokens else None,
        )


def board() -> str:
    """Name and driver of the GPU that is measured, or that nobody says them."""
    with _device() as found:
        if found is None:
            return "not known: no NVML (package nvidia-ml-py and an NVIDIA driver)"
        library, handle = found
        name, driver = library.nvmlDeviceGetName(handle), library.nvmlSystemGetDriverVersion()
    said = [x if isinstance(x, str) else x.decode() for x in (name, driver)]
    return f"{said[0]}, driver {said[1]}"


def _read() -> _Reading:
    used = energy = None
    with _device() as found:
        if found is not None:
            library, handle = found
            used = _asked(library, lambda: int(library.nvmlDeviceGetMemoryInfo(handle).used))
            # Volta and later; a Jetson and some virtual GPUs have no such counter.
            energy = _asked(
                library, lambda: int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
            )
    return _Reading(used, energy, perf_counter())


def _asked(library: Any, question: Any) -> int | None:
    try:
        answer: int = question()
    except library.NVMLError:  # not supported by this board, or not permitted
        return None
    return answer


@contextmanager
def _device() -> Iterator[tuple[Any, Any] | None]:
    """NVML and the handle of the first GPU that CUDA shows this process; None without either."""
    if find_spec("pynvml") is None:
        yield None
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver or no device
        yield None
        return
    try:
        yield _first(pynvml)
    finally:
        pynvml.nvmlShutdown()


def _first(library: Any) -> tuple[Any, Any] | None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        if first.isdigit():
            # CUDA orders by speed, NVML by bus, unless CUDA_DEVICE_ORDER=PCI_BUS_ID: with several
            # different boards that has to be set for these figures to be the right board's.
            return library, library.nvmlDeviceGetHandleByIndex(int(first))
        if first.startswith(("GPU-", "MIG-")):
            return library, library.nvmlDeviceGetHandleByUUID(first)
    except library.NVMLError:
        return None
    return None


def _loaded_torch() -> Any:
    """Torch where it is imported and has a GPU in use; None otherwise, without importing it."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _wait() -> None:
    torch = _loaded_torch()
    if torch is not None:
        torch.cuda.synchronize()


def _torch_peaks() -> tuple[int | None, int | None]:
    torch = _loaded_torch()
    if torch is None:
        return None, None
    return int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())
