"""Finds the data that ships with the package, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def data_root(kind: str) -> Path:
    """Folder of `profiles` or `calibration`: beside the package in a checkout, inside it in a wheel."""
    installed = PACKAGE / "_data" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind
