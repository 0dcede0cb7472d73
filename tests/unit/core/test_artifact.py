"""Finished or nothing: what is left after success, exceptions, kills and full disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from exporter.core import artifact
from exporter.core.artifact import atomic_directory, need_space, partial_path, write_atomic
from exporter.core.errors import EnvironmentLacks, InputRefused

Usage = namedtuple("Usage", "total used free")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(final: Path, error: BaseException) -> None:
    with atomic_directory(final) as work:
        (work / "half").write_text("x")
        raise error


def test_a_finished_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with atomic_directory(final) as work:
        (work / "sub").mkdir()
        (work / "sub" / "a.txt").write_text("a")
        assert not final.exists()
        assert work.parent == final.parent
    assert (final / "sub" / "a.txt").read_text() == "a"
    assert names(final.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), InputRefused("no")])
def test_after_an_exception_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_half_way(tmp_path / "out", error)
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with (
        pytest.raises(InputRefused, match="output folder exists"),
        atomic_directory(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_the_leftover_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from exporter.core.artifact import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    final = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(final)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    assert (partial_path(final) / "half").exists()
    with atomic_directory(final) as work:
        (work / "whole").write_text("x")
    assert names(final) == ["whole"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("code", "match"),
    [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (errno.EROFS, "not allowed")],
)
def test_a_full_disk_is_explained_and_cleaned_up(tmp_path: Path, code: int, match: str) -> None:
    with pytest.raises(EnvironmentLacks, match=match):
        fail_half_way(tmp_path / "out", OSError(code, os.strerror(code)))
    assert names(tmp_path) == []


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out"):
        (tmp_path / "missing").read_text()


def test_write_atomic_replaces_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(EnvironmentLacks, match="disk full"):
        write_atomic(path, b"three")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.json"]


def test_write_atomic_replaces_a_link_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "keep"
    assert not (tmp_path / "link").is_symlink()


def test_need_space_asks_the_disk_of_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> Usage:
        asked.append(Path(place))
        return Usage(10, 5, 5)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    need_space(tmp_path / "a" / "b", 5)
    assert asked == [tmp_path]
    with pytest.raises(EnvironmentLacks, match="disk space"):
        need_space(tmp_path / "a" / "b", 6)
