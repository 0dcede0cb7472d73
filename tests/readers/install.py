"""Installs the other readers at pinned versions into ``build/readers``, apart from this package."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "readers"
OFFLINE = (
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ETIMEDOUT",
    "ENETUNREACH",
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "No matching distribution found",
)


def node_folder() -> Path:
    """transformers.js with its lock file; install scripts do not run. Skips without node or npm."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; transformers.js needs it")
    lock = HERE / "transformers_js" / "package-lock.json"

    def install(folder: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(lock.parent / name, folder / name)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)

    folder = _installed("transformers-js", lock, install)
    # Beside its packages, where node looks for them; the name keeps workers apart.
    script = folder / f"caption-{os.getpid()}.mjs"
    shutil.copyfile(lock.parent / "caption.mjs", script)
    return script


def genai_python() -> Path:
    """The Python of an environment that holds onnxruntime-genai and nothing of this package."""
    pins = HERE / "genai" / "requirements.txt"

    def install(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "install", "--quiet", "--requirement", str(pins)], folder)

    return _installed("genai", pins, install) / "bin" / "python"


def _installed(name: str, pins: Path, install: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    done = folder / "installed"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not done.exists():
            # In place, since an environment of Python cannot be moved; the mark comes last.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            install(folder)
            done.touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=540)
    if done.returncode == 0:
        return
    if any(word in done.stderr for word in OFFLINE):
        pytest.skip(
            f"{command[0]} reaches no registry: {done.stderr.strip().splitlines()[-1][:200]}"
        )
    raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
