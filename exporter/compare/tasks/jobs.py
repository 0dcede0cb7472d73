"""One measured process of a task: what it is asked, what it answers, and how it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.compare.jobs import Scores
from exporter.compare.process import RESULT, ask, read_answer
from exporter.core.digest import sha256_json
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.families.tasks import Task

WORKER = "exporter.compare.tasks.worker"
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

    Arrays are beside it in `ARRAYS`. `scale`: what cosines are multiplied by, `bias`: what is added
    then; `head` and `head_labels`: what a text encoder ends in; `entities`: (type, start, end) per case.
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
    bias: float | None = None
    head: str | None = None
    head_labels: tuple[str, ...] = ()
    entities: list[list[tuple[str, int, int]]] = []
    written: list[Written] = []


def run_task_job(job: TaskJob, progress: Progress = silent) -> TaskResult:
    """Run `job` in a fresh process; see `compare.process.ask`."""
    return ask(WORKER, job, TaskResult, progress)


def read_task_result(folder: Path) -> TaskResult | None:
    """A finished result; None when there is none, or one of another version, or a damaged one."""
    return read_answer(folder / RESULT, TaskResult)


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
