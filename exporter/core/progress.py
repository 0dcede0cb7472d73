"""How long work tells how far it is. The command line draws it; the rooms only report."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives `done` of `total` steps and a short word on the current one."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Take note."""


def silent(done: int, total: int, what: str = "") -> None:
    """A `Progress` that shows nothing."""
