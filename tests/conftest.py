"""One thread per test process, no network, and skips for hardware that is not there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# Set before any test imports torch or onnxruntime: two workers share two cores.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without an NVIDIA driver and `tensorrt` tests without TensorRT, saying so."""
    lacking = {}
    if not Path("/dev/nvidiactl").exists():
        lacking["gpu"] = "no NVIDIA driver on this machine"
    if find_spec("tensorrt") is None:
        lacking["tensorrt"] = "the package tensorrt is not installed"
    for item in items:
        for marker, reason in lacking.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
