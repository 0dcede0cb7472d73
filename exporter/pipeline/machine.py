"""What this machine is: memory it may use, its GPU, and the target profile with its own figures."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from exporter.catalog.profiles import target_profiles
from exporter.catalog.schema import Memory, Quantity, TargetProfile
from exporter.runtimes.threads import usable_cores

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
BOARD = Path("/proc/device-tree/model")
QUERY = "--query-gpu=name,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """The first GPU as the driver describes it; `memory` in bytes."""

    name: str
    memory: int
    compute_capability: str


def usable_memory(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process may use: the machine's memory, lowered to its cgroups' limits."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folders = {root, root / "memory"}
    for line in _text(membership).splitlines():
        inner = line.rpartition(":")[2].lstrip("/")
        for base in (root, root / "memory"):
            group = base / inner
            if ".." not in group.parts:
                folders |= {group, *(p for p in group.parents if p.is_relative_to(base))}
    found = [
        int(text)
        for folder in folders
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _text(folder / name).strip()).isdigit()
    ]
    return min([total, *found])


def with_own_figures(profile: TargetProfile) -> TargetProfile:
    """A CPU class with this machine's cores and memory."""
    cores = usable_cores()
    scale = cores / profile.cores if profile.cores else 1.0
    memory = Memory(
        total_gb=Quantity(usable_memory() / 1e9, "this machine, cgroup limit", "measured")
    )
    rates = {
        name: msgspec.structs.replace(rate, value=rate.value * scale)
        for name, rate in profile.rates.items()
    }
    return msgspec.structs.replace(profile, memory=memory, rates=rates, cores=cores)


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU by NVML (package nvidia-ml-py) or nvidia-smi; None without one."""
    return _by_nvml() if find_spec("pynvml") else _by_smi()


def gpu_target(gpu: Gpu) -> TargetProfile | None:
    """The profile of that GPU with the memory the driver reports; None when no profile names it."""
    names = {device: t for t in target_profiles().values() for device in t.devices}
    # Two cards of one name differ in memory only: the driver's figure is the one that counts.
    profile = names.get(gpu.name)
    if profile is None:
        return None
    memory = Memory(total_gb=Quantity(gpu.memory / 1e9, "the driver of this machine", "measured"))
    return msgspec.structs.replace(profile, memory=memory)


def jetson_target(board: Path = BOARD) -> TargetProfile | None:
    """The profile of a Jetson by its device tree; None elsewhere."""
    model = _text(board).rstrip("\0 \n")
    if "Jetson" not in model:
        return None
    gigabytes = usable_memory() / 1e9
    modules = {
        "Orin Nano": "jetson-orin-nano-8gb" if gigabytes > 5 else "",
        "Orin NX": "jetson-orin-nx-16gb" if gigabytes > 10 else "",
        "AGX Orin": "jetson-agx-orin-64gb" if gigabytes > 40 else "",
        "Thor": "jetson-thor" if gigabytes > 100 else "",
    }
    name = next((profile for mark, profile in modules.items() if mark in model), "")
    return target_profiles().get(name)


def _by_nvml() -> Gpu | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no device: both mean that there is no GPU to use
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        return Gpu(name if isinstance(name, str) else name.decode(), total, f"{major}.{minor}")
    finally:
        pynvml.nvmlShutdown()


def _by_smi() -> Gpu | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, QUERY, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):  # installed, but no driver answers
        return None
    return read_smi(done.stdout)


def read_smi(text: str) -> Gpu | None:
    """The first line of nvidia-smi's CSV: name, MiB, compute capability."""
    fields = [field.strip() for field in text.partition("\n")[0].split(",")]
    if len(fields) != 3 or not fields[1].isdigit():
        return None
    return Gpu(fields[0], int(fields[1]) * 2**20, fields[2])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
