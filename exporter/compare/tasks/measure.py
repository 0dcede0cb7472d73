"""What every task's measure gives, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from exporter.catalog.schema import TaskGate
from exporter.compare.records import Figure
from exporter.compare.tasks.jobs import TaskJobCase, TaskResult
from exporter.compare.tasks.records import LabelRow, TaskAnswer, Unit
from exporter.compare.verdict import Quantity
from exporter.core.digest import sha256_bytes
from exporter.core.errors import InputRefused
from exporter.core.text_cases import TextCase


@dataclass(frozen=True)
class Measured:
    """One model's figures and, for every case in order, its answer.

    Quantities are in the order of cause; a string says why one could not be measured.
    """

    figures: Mapping[str, Figure]
    differences: Mapping[str, Figure]
    quantities: Mapping[str, Quantity | str]
    answers: Sequence[TaskAnswer]
    labels: Mapping[str, LabelRow] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A case as the report shows it."""

    id: str
    patient: str
    kind: str
    image: Path | None
    text: str | None
    truth: Mapping[str, str]


# From both models' findings, case ids and a folder to pictures in it, by case id.
Draw = Callable[[Any, Any, Sequence[str], Path], dict[str, Path]]


class Measure(Protocol):
    """One task on one set of cases. `read` and `measure` share a type of the task's own."""

    unit: Unit

    @property
    def subjects(self) -> Sequence[Subject]:
        """The cases in order."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """Words that images are held against."""
        ...

    @property
    def texts(self) -> Sequence[str]:
        """Texts that are embedded once for all cases."""
        ...

    def job_cases(self) -> tuple[TaskJobCase, ...]:
        """The cases as a worker gets them."""
        ...

    def read(self, result: TaskResult, folder: Path) -> Any:
        """What a worker found. Raises `InputRefused` for a damaged file."""
        ...

    def measure(self, own: Any, base: Any, gate: TaskGate) -> Measured:
        """A model against the reference, which may be itself."""
        ...

    def method(self) -> dict[str, str]:
        """How each figure was measured."""
        ...

    @property
    def draw(self) -> Draw | None:
        """Draws cases of the report, where there is more to see than the image."""
        ...


class Annotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an expert marked on one image.

    labels: findings that are there (true) or not; masks: file of the mask of each label, beside the
    annotations, of the image's size, over 127 inside.
    """

    id: str
    labels: dict[str, bool] = {}
    masks: dict[str, str] = {}


def text_job_cases(cases: Sequence[TextCase]) -> tuple[TaskJobCase, ...]:
    """Texts as a worker gets them."""
    return tuple(TaskJobCase(c.id, sha256_bytes(c.text.encode()), text=c.text) for c in cases)


def read_annotations(path: Path) -> dict[str, Annotation]:
    """Read annotations, one JSON object a line, by the case's id; mask files become full paths.

    Raises `InputRefused` with the line that is wrong, also for a mask that lies elsewhere.
    """
    found: dict[str, Annotation] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected annotations") from error
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = msgspec.json.decode(raw, type=Annotation)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputRefused(f"{where}: {error}; expected id, labels, masks") from error
        if line.id in found:
            raise InputRefused(f"{where}: id '{line.id}' occurs twice; expected unique ids")
        masks = {label: _mask(path.parent, name, where) for label, name in line.masks.items()}
        found[line.id] = msgspec.structs.replace(line, masks=masks)
    return found


def _mask(folder: Path, name: str, where: str) -> str:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise InputRefused(f"{where}: mask '{name}' is not a path beside the annotations")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise InputRefused(f"{where}: mask {path} is missing or not a regular file")
    return str(path)
