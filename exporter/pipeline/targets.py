"""Which target profile fits this machine."""

from __future__ import annotations

import platform
from pathlib import Path

from exporter.catalog.profiles import find_target
from exporter.catalog.schema import TargetProfile
from exporter.core.errors import EnvironmentLacks
from exporter.pipeline.machine import BOARD, find_gpu, gpu_target, jetson_target, with_own_figures

CPUINFO = Path("/proc/cpuinfo")


def choose_target(name: str) -> TargetProfile:
    """The target called `name`; ``auto`` is this machine's processor, with its cores and memory.

    Builds run and compare on the processor; `machine_targets` lists the GPU as well. Raises
    `WrongUsage` for an unknown name, `EnvironmentLacks` when ``auto`` finds none.
    """
    if name != "auto":
        return find_target(name)
    return with_own_figures(find_target(this_machine()))


def machine_targets() -> tuple[TargetProfile, ...]:
    """What this machine can run a bundle on: its GPU when a profile knows it, and its processor.

    Raises `EnvironmentLacks` when no profile describes the processor.
    """
    board, gpu = jetson_target(), find_gpu()
    found = board or (gpu_target(gpu) if gpu else None)
    return (*((found,) if found else ()), choose_target("auto"))


def unknown_gpu() -> str:
    """A line on this machine's GPU where no profile describes it; "" otherwise."""
    board = BOARD.read_text(errors="replace").rstrip("\0 \n") if BOARD.is_file() else ""
    gpu = find_gpu()
    if "Jetson" in board:
        name = "" if jetson_target() else board
    else:
        name = "" if gpu is None or gpu_target(gpu) else f"{gpu.name}, {gpu.memory / 1e9:.1f} GB"
    if not name:
        return ""
    return (
        f"GPU of this machine: {name} (by its driver or board); no target profile knows it, so it is "
        "left out; `medexport targets` lists those known, --target takes one"
    )


def this_machine() -> str:
    """Name of the CPU target profile of this machine."""
    machine = platform.machine().lower()
    flags = cpu_flags()
    if machine in ("aarch64", "arm64"):
        return "cpu-arm64-dotprod"
    if machine in ("x86_64", "amd64"):
        if flags & {"avx512_vnni", "avx_vnni"}:
            return "cpu-avx512-vnni"
        if "avx2" in flags or not flags:
            return "cpu-avx2"
    raise EnvironmentLacks(f"no target profile for a {machine} processor; give --target NAME")


def cpu_flags() -> frozenset[str]:
    """Feature flags of the first processor as the kernel lists them; empty where it lists none."""
    if not CPUINFO.is_file():
        return frozenset()
    for line in CPUINFO.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
