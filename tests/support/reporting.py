"""Stage reporters for tests."""

from __future__ import annotations

import os
import signal


class Recorder:
    """Keeps which stages ran, and which of them were found finished."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, bool]] = []
        self.notes: dict[str, str] = {}
        self.expected = 0
        self._name = ""

    def expect(self, stages: int) -> None:
        self.expected = stages

    def begin(self, name: str, detail: str) -> None:
        self._name = name

    def advance(self, done: int, total: int, what: str = "") -> None:
        assert 0 <= done <= total

    def end(self, seconds: float, cached: bool, note: str = "") -> None:
        self.stages.append((self._name, cached))
        self.notes[self._name] = note


class WordKiller(Recorder):
    """Kills its own process with SIGKILL at the first progress report of a stage that says `word`."""

    def __init__(self, stage: str, word: str) -> None:
        super().__init__()
        self._stage, self._word = stage, word

    def advance(self, done: int, total: int, what: str = "") -> None:
        if (self._name, what) == (self._stage, self._word):
            os.kill(os.getpid(), signal.SIGKILL)


class Killer(Recorder):
    """Kills its own process with SIGKILL in the middle of a stage.

    `stage` is the stage's name, `nth` which of its kind (three exports run in a build), `step` the
    progress report at which it dies; -1: at its very beginning.
    """

    def __init__(self, stage: str, nth: int, step: int) -> None:
        super().__init__()
        self._stage, self._nth, self._step = stage, nth, step
        self._seen = self._steps = 0

    def begin(self, name: str, detail: str) -> None:
        super().begin(name, detail)
        self._steps = 0
        self._seen += name == self._stage
        if self._step < 0:
            self._die_if_due()

    def advance(self, done: int, total: int, what: str = "") -> None:
        self._steps += 1
        if self._step >= 0 and self._steps > self._step:
            self._die_if_due()

    def _die_if_due(self) -> None:
        if self._name == self._stage and self._seen == self._nth:
            os.kill(os.getpid(), signal.SIGKILL)
