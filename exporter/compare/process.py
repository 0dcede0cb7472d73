"""Starts a worker in a process of its own, follows it, and says why it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from exporter.core.data import PACKAGE
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError, WrongUsage
from exporter.core.progress import Progress

LOG_LINES = 12


def run_worker(
    module: str, request: Path, log: Path, *, threads: int, total: int, progress: Progress
) -> int:
    """Run ``python -m module request`` without network and return its code; its errors go to `log`.

    A worker prints one line for each of its `total` cases.
    """
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        try:
            assert process.stdout is not None
            # If we die, the worker's next line breaks the pipe and it ends.
            for done, line in enumerate(process.stdout, 1):
                progress(min(done, total), total, line.strip())
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def explain_end(what: str, code: int, log: Path) -> MedexportError:
    """The error for a worker that gave no result: its own class, or what ended it, and its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = " | ".join(line.strip() for line in lines[-LOG_LINES:]) or "it printed nothing"
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; was memory short?" if code == -signal.SIGKILL else ""
        return EnvironmentLacks(
            f"{what} was ended by {name}{hint} Run the same command again to go on; last lines: {last}"
        )
    for kind in (WrongUsage, InputRefused, EnvironmentLacks):
        if code == kind.exit_code:
            return kind(f"{what}: {lines[-1] if lines else last}")
    return MedexportError(
        f"{what} failed with code {code}, expected 0; see {log}; last lines: {last}"
    )
