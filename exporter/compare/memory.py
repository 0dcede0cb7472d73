"""Memory of this process as Linux and the GPU's driver count it; None where they do not say."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

PROC = Path("/proc/self")


def peak_rss(proc: Path = PROC) -> int | None:
    """Peak resident set in bytes since the start or the last `reset_peak` (VmHWM)."""
    return _kilobytes(proc / "status", r"^VmHWM:\s+(\d+) kB")


def unique_bytes(proc: Path = PROC) -> int | None:
    """Unique set size in bytes now: pages that no other process shares (smaps_rollup)."""
    clean = _kilobytes(proc / "smaps_rollup", r"^Private_Clean:\s+(\d+) kB")
    dirty = _kilobytes(proc / "smaps_rollup", r"^Private_Dirty:\s+(\d+) kB")
    return None if clean is None or dirty is None else clean + dirty


def reset_peak(proc: Path = PROC) -> bool:
    """Set the peak back to the present resident set; False where this is not permitted."""
    try:
        # 5 resets VmHWM only (proc(5), since Linux 4.0).
        (proc / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def gpu_memory() -> int | None:
    """GPU memory in bytes that this process holds now, over all NVIDIA GPUs (NVML).

    None without the package nvidia-ml-py, driver or GPU, and where the driver does not list this
    process: it holds nothing, or lists another number for it (containers with process numbers of their
    own), or hides the amount.
    """
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver or no device: both mean that there is nothing to ask
        return None
    held: list[int] = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            own = [p.usedGpuMemory for p in listed if p.pid == os.getpid()]
            held += [int(amount) for amount in own if amount is not None]
    except pynvml.NVMLError:  # a device that forbids the question, such as a shared slice of one
        return None
    finally:
        pynvml.nvmlShutdown()
    return sum(held) if held else None


def _kilobytes(path: Path, pattern: str) -> int | None:
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(pattern, text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
