"""The comparison of a task as data: what compare.json and cases.jsonl hold (schema version 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from exporter.catalog.schema import TaskGate
from exporter.compare.records import Figure, Memory
from exporter.compare.verdict import Judged
from exporter.core.errors import GateFailed, GateInconclusive, InputRefused
from exporter.families.tasks import Task

TASK_SCHEMA = 1
Unit = Literal["images", "texts"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict, immutable record."""


class TaskGateReport(Judged, frozen=True, kw_only=True):
    """The verdict on one candidate of a task; `count` is of `unit`."""

    unit: Unit
    count: int
    margins: TaskGate

    def counted(self) -> tuple[int, str]:
        """See `Judged.counted`."""
        return self.count, self.unit


class Latency(Record, frozen=True):
    """Milliseconds of one step; p90 by early stopping, None from fewer than 64 runs.

    `spread` is the interquartile range over the median.
    """

    runs: int
    median: float
    p90: float | None
    spread: float


class TaskSpeed(Record, frozen=True):
    """Latency of each step over `rounds` interleaved processes; `load` in milliseconds."""

    rounds: int
    threads: int
    load: float
    steps: dict[str, Latency]


class LabelRow(Record, frozen=True):
    """Figures of one label, and of how many cases it is true and false (None: no ground truth)."""

    positives: int | None
    negatives: int | None
    figures: dict[str, Figure]
    differences: dict[str, Figure] = {}


class KindRow(Record, frozen=True):
    """The cases of one kind (modality): how many are answered otherwise, and how far they moved."""

    count: int
    patients: int
    changed: int
    distance: float
    worst: float


class TaskRow(Record, frozen=True):
    """All figures of one model; differences are this model minus the reference, paired."""

    name: str
    role: Literal["reference", "noise floor", "candidate"]
    threads: int
    model_sha256: str
    versions: dict[str, str]
    parts: dict[str, int]
    bytes: int
    ratio: float
    figures: dict[str, Figure] = {}
    differences: dict[str, Figure] = {}
    labels: dict[str, LabelRow] = {}
    kinds: dict[str, KindRow] = {}
    speed: TaskSpeed | None = None
    memory: Memory | None = None


class TaskAnswer(Record, frozen=True):
    """What one model said of one case.

    changes: what is otherwise than in the reference's answer, in words; distance: how far the two
    are from each other, by the task's measure (0: not at all).
    """

    said: str
    changes: tuple[str, ...]
    distance: float
    values: dict[str, float] = {}


class TaskCase(Record, frozen=True):
    """One image or text with what every model said; `image` is a path, in files only its name."""

    id: str
    patient: str
    kind: str
    sha256: str
    image: str | None
    text: str | None
    truth: dict[str, str]
    answers: dict[str, TaskAnswer]


class TaskComparison(Record, frozen=True):
    """Everything that was measured; rows in the order given, the noise floor after the reference.

    `labels` are the words that images were held against. `gates` holds a verdict per candidate, and
    the noise floor's: the gate on no change at all.
    """

    schema: int
    task: Task
    summary: str
    reference: str
    unit: Unit
    prompt: str
    labels: tuple[str, ...]
    count: int
    patients: int
    kinds: dict[str, int]
    machine: dict[str, str]
    method: dict[str, str]
    rows: tuple[TaskRow, ...]
    gates: tuple[TaskGateReport, ...] = ()
    cases: tuple[TaskCase, ...] = ()

    def gate(self, name: str) -> TaskGateReport:
        """The verdict on the candidate called `name`. Raises KeyError."""
        return {gate.candidate: gate for gate in self.gates}[name]

    def row(self, name: str) -> TaskRow:
        """The row called `name`. Raises KeyError."""
        return {row.name: row for row in self.rows}[name]

    def to_text(self) -> str:
        """One screen: verdicts, table, notes; no trailing newline."""
        from exporter.compare.tasks.table import task_table

        return task_table(self)

    def enforce(self, name: str, *, smoke: bool = False) -> None:
        """Raise `GateFailed` or `GateInconclusive` unless the candidate called `name` passed.

        With `smoke` (a quick look was asked for) only a failure is an error. Raises KeyError.
        """
        found = self.gate(name)
        first = f"'{name}' against '{self.reference}': {found.label}: {found.reason}"
        if found.verdict == "FAIL":
            raise GateFailed(f"{first}; do not release it, see report.html for the cases")
        if found.verdict == "INCONCLUSIVE" and not smoke:
            more = f"{found.needed} would decide" if found.needed else "no number of cases is known"
            raise GateInconclusive(f"{first}; {found.count} {found.unit} are too few, {more}")


def read_task_comparison(path: Path) -> TaskComparison:
    """Read a compare.json of a task, without its cases. Raises `InputRefused` on another schema."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=TaskComparison)
    except (OSError, msgspec.DecodeError) as error:
        raise InputRefused(
            f"{path}: not a task comparison of schema {TASK_SCHEMA} ({error})"
        ) from error
    if found.schema != TASK_SCHEMA:
        raise InputRefused(f"{path}: schema {found.schema}; expected {TASK_SCHEMA}, compare again")
    return found
