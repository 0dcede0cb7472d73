"""What the machine is, for the record of a comparison."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from exporter.compare.gpu import board


def machine(threads: int, *, gpu: bool = False) -> dict[str, str]:
    """Processor, cores, threads and system in words; with `gpu` the board too."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the architecture's name has to do
    return {
        "cpu": name,
        "cores": str(os.cpu_count() or 1),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.release()}",
        **({"gpu": board()} if gpu else {}),
    }
