"""What is on disk for certain at the moment a file gets its final name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Syncs:
    """Records, for each rename, its target and the files whose content had been synced by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renames: list[tuple[Path, frozenset[Path]]] = []
        self._synced: set[Path] = set()
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self._on_fsync)
        monkeypatch.setattr(os, "replace", self._on_replace)

    def _on_fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self._synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    def _on_replace(self, source: Path, target: Path) -> None:
        if Path(source) in self._synced:
            self._synced.add(Path(target))
        self.renames.append((Path(target), frozenset(self._synced)))
        self._replace(source, target)
