"""One stage: a folder that is finished or not there, found again by a key over all its inputs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from exporter.core.artifact import atomic_directory, write_atomic
from exporter.core.digest import canonical_json, list_files, sha256_json
from exporter.core.modelfiles import read_json
from exporter.core.progress import Progress
from exporter.pipeline.tools import tool_versions


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, and the key that stands for its content in its children's keys."""

    stage: str
    path: Path
    key: str


class Reporter(Protocol):
    """What the command line draws: stages beginning, advancing and ending."""

    def expect(self, stages: int) -> None:
        """Take note of how many stages will run in all."""

    def begin(self, name: str, detail: str) -> None:
        """A stage starts."""

    def advance(self, done: int, total: int, what: str = "") -> None:
        """It has done `done` of `total` steps."""

    def end(self, seconds: float, cached: bool, note: str = "") -> None:
        """It is finished, or was found finished (`cached`)."""


@dataclass
class Stages:
    """Runs stages in a work folder and reuses those that are finished."""

    work: Path
    reporter: Reporter
    resume: bool = True
    done: list[Artifact] = field(default_factory=list)

    def run(
        self,
        name: str,
        make: Callable[[Path, Progress], object],
        *,
        version: int,
        parents: Sequence[str],
        options: Mapping[str, Any],
        detail: str = "",
    ) -> Artifact:
        """Return the finished artifact for these inputs, making it with ``make(folder, progress)``.

        The key covers name, version, options, the parents' keys and the tools' versions. An artifact
        whose files are not those recorded when it was finished is made again. Text that `make`
        returns is reported as the stage's note.
        """
        key = sha256_json(
            {
                "stage": name,
                "version": version,
                "options": dict(options),
                "parents": list(parents),
                "tools": tool_versions(),
            }
        )
        path = self.work / f"{name}-{key[:16]}"
        seal = self.work / f"{name}-{key[:16]}.json"
        self.reporter.begin(name, detail)
        start = time.perf_counter()
        cached, said = self.resume and _is_whole(path, seal), None
        if not cached:
            _discard(path, seal)
            with atomic_directory(path) as folder:
                said = make(folder, self.reporter.advance)
            write_atomic(seal, canonical_json(_fingerprint(path)))
        note = said if isinstance(said, str) else ""
        self.reporter.end(time.perf_counter() - start, cached, note)
        artifact = Artifact(name, path, key)
        self.done.append(artifact)
        return artifact


def _fingerprint(path: Path) -> dict[str, list[int]]:
    stats = {p.as_posix(): (path / p).stat() for p in list_files(path)}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def _is_whole(path: Path, seal: Path) -> bool:
    return path.is_dir() and seal.is_file() and read_json(seal) == _fingerprint(path)


def _discard(path: Path, seal: Path) -> None:
    seal.unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
