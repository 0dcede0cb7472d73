"""Finished or nothing: folders and files that appear under their final name in one rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.core.errors import EnvironmentLacks, InputRefused

PARTIAL = ".partial"


def partial_path(final: Path) -> Path:
    """Where the work for `final` is written until it is complete: a hidden sibling."""
    return final.with_name(f".{final.name}{PARTIAL}")


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; rename it to `final` when the block ends well.

    A leftover of a killed run is removed first. On an exception the temporary folder is removed and
    `final` does not exist. Raises `InputRefused` if `final` exists, `EnvironmentLacks` on a full disk.
    """
    if os.path.lexists(final):
        raise InputRefused(f"output folder exists: {final}; remove it or choose another --out")
    work = partial_path(final)
    try:
        _remove(work)
        work.mkdir(parents=True)
        yield work
        _sync(work)
        os.replace(work, final)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        if explained := _explained(error, final):
            raise explained from error
        raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary sibling and a rename."""
    work = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(data)
        publish(work, path)
    except OSError as error:
        work.unlink(missing_ok=True)
        if explained := _explained(error, path):
            raise explained from error
        raise


def publish(work: Path, final: Path) -> None:
    """Rename the finished file `work` to `final` once its content is on disk."""
    sync_file(work)
    os.replace(work, final)


def sync_file(path: Path) -> None:
    """Return when the content of a file is on disk."""
    # Without this a power cut after a rename can leave complete-looking files that are empty.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def need_space(folder: Path, size: int) -> None:
    """Raise `EnvironmentLacks` when the disk that will hold `folder` has fewer than `size` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise EnvironmentLacks(
            f"disk space: {free / 1e9:.2f} GB free at {place}, {size / 1e9:.2f} GB needed; "
            "free some or choose another --out"
        )


def _remove(leftover: Path) -> None:
    """Remove what a killed run left, be it a folder, a file or a link."""
    if leftover.is_symlink() or leftover.is_file():
        leftover.unlink()
    elif leftover.exists():
        shutil.rmtree(leftover)


def _explained(error: OSError, path: Path) -> EnvironmentLacks | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentLacks(f"disk full while writing {path}; free some space and run it again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentLacks(
            f"not allowed to write {path}: {error.strerror}; choose another --out"
        )
    return None


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)
