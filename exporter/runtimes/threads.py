"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Cores by CPU affinity, lowered to the cgroup's CPU quota (v2 or v1), at least 1.

    `root` is where cgroups are mounted, `membership` the file that names this process's groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [q for folder in _folders(root, membership) if (q := _quota(folder)) is not None]
    return max(1, min([cores or 1, *(math.ceil(q) for q in quotas)]))


def _folders(root: Path, membership: Path) -> list[Path]:
    """The process's own group and all groups above it: a quota holds for everything below."""
    folders = {root, root / "cpu"}
    for line in _text(membership).splitlines():
        _, _, relative = line.partition(":")
        controllers, _, inner = relative.partition(":")
        base = root / "cpu" if "cpu" in controllers.split(",") else root
        group = base / inner.lstrip("/")
        if ".." not in group.parts:
            folders |= {group, *(p for p in group.parents if p.is_relative_to(root))}
    return sorted(folders)


def _quota(folder: Path) -> float | None:
    """Cores of a group's quota; None when unlimited or unknown."""
    fields = _text(folder / "cpu.max").split()
    if not fields:
        fields = [_text(folder / f"cpu.cfs_{k}_us").strip() for k in ("quota", "period")]
    try:
        quota, period = (float(f) for f in fields)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
