"""Versions of everything that shapes an artifact: part of cache keys and of the manifest."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from exporter import __version__

PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime", "onnx", "torch", "transformers", "peft")


@cache
def tool_versions() -> dict[str, str]:
    """Installed versions by distribution name; what is not installed is left out."""
    found = {"medexport": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
