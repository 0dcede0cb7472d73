"""Checks a bundle before anything in it is opened: every byte, no more files and no fewer."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from exporter.bundle.manifest import (
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Manifest,
    read_manifest,
)
from exporter.bundle.sign import check_signature
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent


@dataclass(frozen=True)
class Verified:
    """A bundle whose files are what its manifest says. `signer` is the key's fingerprint, if checked."""

    manifest: Manifest
    files: int
    size: int
    signed: bool
    signer: str | None


def verify_bundle(
    bundle: Path, key: Path | None = None, *, progress: Progress = silent
) -> Verified:
    """Check all files of `bundle` against its manifest, and the signature when `key` is given.

    Raises `InputRefused` naming the first differences: a missing, added, changed, linked or special
    file, a path that leaves the bundle, a changed manifest, a wrong or missing signature.
    """
    if not bundle.is_dir():
        raise InputRefused(f"{bundle}: no such folder; expected a bundle")
    manifest = read_manifest(bundle)
    signer = check_signature(bundle, key) if key else None
    problems = _unlisted(bundle, manifest)
    for done, entry in enumerate(manifest.files, 1):
        problems += _differences(bundle, entry)
        progress(done, len(manifest.files), entry.path)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputRefused(
            f"{bundle}: not what was packaged: {'; '.join(problems[:3])}{more}; get the bundle again"
        )
    total = sum(e.size for e in manifest.files)
    return Verified(manifest, len(manifest.files), total, (bundle / SIGNATURE).is_file(), signer)


def _unlisted(bundle: Path, manifest: Manifest) -> list[str]:
    listed = {e.path for e in manifest.files} | {MANIFEST, SIGNATURE}
    found = []
    for folder, folders, files in os.walk(bundle):
        # A linked folder would be walked as a file here and is never part of a bundle.
        links = [f for f in folders if (Path(folder) / f).is_symlink()]
        found += [(Path(folder) / f).relative_to(bundle).as_posix() for f in (*files, *links)]
    return [f"{path} is not in the manifest" for path in sorted(set(found) - listed)]


def _differences(bundle: Path, entry: FileEntry) -> list[str]:
    pure = PurePosixPath(entry.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in entry.path or str(pure) != entry.path:
        return [f"path '{entry.path}' leaves the bundle"]
    path = bundle / entry.path
    try:
        status = path.lstat()
    except OSError:
        return [f"{entry.path} is missing"]
    if not stat.S_ISREG(status.st_mode) or path.resolve() != bundle.resolve() / entry.path:
        return [f"{entry.path} is not a regular file (link or special file)"]
    return _content_differences(path, entry, status)


def _content_differences(path: Path, entry: FileEntry, status: os.stat_result) -> list[str]:
    if status.st_nlink != 1:
        return [f"{entry.path} has {status.st_nlink} hard links, expected 1"]
    if status.st_size != entry.size:
        return [f"{entry.path} has {status.st_size} bytes, expected {entry.size}"]
    if sha256_file(path) != entry.sha256:
        return [f"{entry.path} was changed (SHA-256 differs)"]
    return []
