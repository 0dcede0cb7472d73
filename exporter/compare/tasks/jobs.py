"""One measured process of a task: what it is asked, what it answers, and how it is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.compare.jobs import Scores
from exporter.core.artifact import write_atomic
from exporter.core.data import PACKAGE
from exporter.core.digest import sha256_json
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError, WrongUsage
from exporter.core.progress import Progress, silent
from exporter.families.tasks import Task

WORKER = "exporter.compare.tasks.worker"
LOG_LINES = 12
ARRAYS = "arrays.npz"


class TaskJobCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image or text; the digest makes a cached result of another one useless.

    `texts` are what masks of this image are asked for.
    """

    id: str
    sha256: str
    image: str | None = None
    text: str | None = None
    texts: tuple[str, ...] = ()


class TaskJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker does.

    role: "reference" answers all cases and, where the task generates, keeps its logits in
    `folder`/logits; "candidate" answers them and scores the tokens of the worker in `reference`;
    "speed" answers the cases for the clock only, `repeat` tells one such process from the next.
    `labels` go into `template` (None: the model's own); `texts` are embedded as they are.
    """

    task: Task
    name: str
    role: Literal["reference", "candidate", "speed"]
    model_dir: str
    model_sha256: str
    threads: int
    cases: tuple[TaskJobCase, ...]
    folder: str
    labels: tuple[str, ...] = ()
    template: str | None = None
    texts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    reference: str | None = None
    reference_job: str | None = None
    repeat: int = 0

    @property
    def digest(self) -> str:
        """Digest of everything that determines the answer."""
        return sha256_json(msgspec.to_builtins(self))


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Greedy text of one case; `scores` where logits were compared."""

    text: str
    tokens: list[int]
    stopped: bool
    scores: Scores | None = None


class TaskResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker measured; memory as in `compare.jobs.JobResult`, `seconds` of each step per case.

    Arrays are beside it in `ARRAYS`. `scale`: what cosines are multiplied by; `head` and
    `head_labels`: what a text encoder ends in; `entities`: (type, start, end) per case.
    """

    job: str
    load_seconds: float
    peak_load: int | None
    peak_run: int | None
    unique: int | None
    peak_was_reset: bool
    versions: dict[str, str]
    seconds: dict[str, list[float]]
    scale: float | None = None
    head: str | None = None
    head_labels: tuple[str, ...] = ()
    entities: list[list[tuple[str, int, int]]] = []
    written: list[Written] = []


def run_task_job(job: TaskJob, progress: Progress = silent) -> TaskResult:
    """Run `job` in a fresh process, or return its finished result if this very job was done before.

    Raises the worker's own error class, or `EnvironmentLacks` when it was killed, with its last lines.
    """
    folder = Path(job.folder)
    done = read_task_result(folder)
    if done is not None and done.job == job.digest:
        return done
    (folder / "result.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    request, log = folder / "request.json", folder / "worker.log"
    write_atomic(request, msgspec.json.encode(job))
    code = _run(request, log, job, progress)
    result = read_task_result(folder)
    if code != 0 or result is None:
        raise _explained(job, code, log)
    return result


def read_task_result(folder: Path) -> TaskResult | None:
    """A finished result; None when there is none, or one of another version, or a damaged one."""
    try:
        return msgspec.json.decode((folder / "result.json").read_bytes(), type=TaskResult)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def read_array(folder: Path, name: str) -> NDArray[np.generic]:
    """One array of a finished worker. Raises `InputRefused` when it is missing or damaged."""
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            found: NDArray[np.generic] = arrays[name]
    except (OSError, KeyError, ValueError) as error:
        raise InputRefused(
            f"{folder / ARRAYS}: {error}; expected array '{name}', remove the work folder"
        ) from error
    return found


def _run(request: Path, log: Path, job: TaskJob, progress: Progress) -> int:
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", WORKER, str(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            # The worker prints one line per case; if we die, its next line breaks the pipe.
            for done, line in enumerate(process.stdout, 1):
                progress(min(done, len(job.cases)), len(job.cases), line.strip())
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()


def _explained(job: TaskJob, code: int, log: Path) -> MedexportError:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = " | ".join(line.strip() for line in lines[-LOG_LINES:]) or "it printed nothing"
    what = f"the {job.role} process of '{job.name}'"
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; was memory short?" if code == -signal.SIGKILL else ""
        return EnvironmentLacks(
            f"{what} was ended by {name}{hint} Run the same command again; last lines: {last}"
        )
    for kind in (WrongUsage, InputRefused, EnvironmentLacks):
        if code == kind.exit_code:
            return kind(f"{what}: {lines[-1] if lines else last}")
    return MedexportError(
        f"{what} failed with code {code}, expected 0; see {log}; last lines: {last}"
    )
