"""Starts a worker in a process of its own, follows it, and says why it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from exporter.core.artifact import write_atomic
from exporter.core.data import PACKAGE
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError, WrongUsage
from exporter.core.progress import Progress

LOG_LINES = 12
RESULT = "result.json"


class Asked(Protocol):
    """A request to a worker, a msgspec struct; `folder` is for its answer."""

    @property
    def name(self) -> str:
        """Which model is asked."""
        ...

    @property
    def role(self) -> str:
        """What it is asked for."""
        ...

    @property
    def threads(self) -> int:
        """Threads to compute with."""
        ...

    @property
    def cases(self) -> Sized:
        """What it prints a line for, each."""
        ...

    @property
    def folder(self) -> str:
        """Where request, log and answer are kept."""
        ...

    @property
    def digest(self) -> str:
        """Digest of everything that determines the answer."""
        ...


class Answer(Protocol):
    """What a worker measured, a msgspec struct."""

    @property
    def job(self) -> str:
        """Digest of the request."""
        ...


JobT = TypeVar("JobT")
AnswerT = TypeVar("AnswerT", bound=Answer)


def serve(arguments: Sequence[str], kind: type[JobT], run: Callable[[JobT], object]) -> int:
    """A worker's main: do the request in the file named by the one argument; returns the exit code."""
    try:
        run(msgspec.json.decode(Path(arguments[0]).read_bytes(), type=kind))
    except MedexportError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def ask(worker: str, job: Asked, kind: type[AnswerT], progress: Progress) -> AnswerT:
    """Run `job` in a fresh process of the module `worker`, or return its finished answer if this very
    job was done before.

    Raises the worker's own error class, or `EnvironmentLacks` when it was killed, with its last lines.
    """
    folder = Path(job.folder)
    done = answered(job, kind)
    if done is not None:
        return done
    (folder / RESULT).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    request, log = folder / "request.json", folder / "worker.log"
    write_atomic(request, msgspec.json.encode(job))
    code = run_worker(
        worker, request, log, threads=job.threads, total=len(job.cases), progress=progress
    )
    result = read_answer(folder / RESULT, kind)
    if code != 0 or result is None:
        raise explain_end(f"the {job.role} process of '{job.name}'", code, log)
    return result


def answered(job: Asked, kind: type[AnswerT]) -> AnswerT | None:
    """The answer of an earlier run of this very job, or None."""
    result = read_answer(Path(job.folder) / RESULT, kind)
    return result if result is not None and result.job == job.digest else None


def read_answer(path: Path, kind: type[AnswerT]) -> AnswerT | None:
    """A finished answer; None when there is none, or one of another version, or a damaged one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


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
