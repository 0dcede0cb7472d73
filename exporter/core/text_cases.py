"""One text to be encoded or summarised, as the comparison sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """An entity at ``text[start:end]``, in characters."""

    type: str
    start: int
    end: int


@dataclass(frozen=True)
class TextCase:
    """A text with whom it is about; `summary`, `entities` and `label` are ground truth, None if unknown.

    `kind` is what slices are made by, such as the examination.
    """

    id: str
    text: str
    patient: str
    kind: str = "text"
    summary: str | None = None
    entities: tuple[Entity, ...] | None = None
    label: str | None = None
