"""What the user sees while something runs: a live line in a terminal, log lines in a pipe."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click

TICK, LINE_EVERY = 0.1, 10.0


class Console:
    """A stage reporter. Writes to stderr, so that stdout holds results only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._stages = self._index = 0
        self._name = self._detail = ""
        self._start = self._shown = 0.0

    def expect(self, stages: int) -> None:
        """Take note of how many stages will run: they are counted from now on."""
        self._stages = stages

    def begin(self, name: str, detail: str) -> None:
        """A stage starts."""
        self._index += 1
        self._name, self._detail = name, detail
        self._start = time.perf_counter()
        self._shown = self._start
        self._draw("...")

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Show how far the stage is, with an estimate of the rest, at most ten times a second."""
        now = time.perf_counter()
        if now - self._shown < (TICK if self._live else LINE_EVERY):
            return
        self._shown = now
        used = now - self._start
        share = f"{100 * done // total:3d}%" if total else "  ?%"
        left = f", about {_clock(used * (total - done) / done)} left" if done and total else ""
        self._draw(f"{share} {_clock(used)}{left}  {what}")

    def end(self, seconds: float, cached: bool, note: str = "") -> None:
        """A stage is finished."""
        how = "reused" if cached else _clock(seconds)
        self._draw(f"{how}  {note}".rstrip(), last=True)

    def _draw(self, text: str, last: bool = False) -> None:
        number = f"[{self._index}/{self._stages}] " if self._stages > 1 else ""
        detail = f" {self._detail}" if self._detail else ""
        line = f"{number}{self._name}{detail}: {text}"
        if self._live:
            width = max(20, shutil.get_terminal_size((100, 24)).columns)
            self._stream.write("\r\x1b[K" + line[: width - 1] + ("\n" if last else ""))
        elif text != "...":
            self._stream.write(line + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns aligned with spaces, the first left, numbers right."""
    table = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        cells = (c.ljust(w) for c, w in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
