"""Memory of this process as Linux counts it; None where the system does not say."""

from __future__ import annotations

import re
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


def _kilobytes(path: Path, pattern: str) -> int | None:
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(pattern, text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
