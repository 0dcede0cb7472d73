"""A tiny model and its int4 folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from tests.support.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model with hidden size 64."""
    return write_tiny_model(tmp_path_factory.mktemp("formats") / "tiny")


@pytest.fixture(scope="session")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as int4-rtn (asymmetric decoder, symmetric 8-bit rest)."""
    out = tmp_path_factory.mktemp("formats") / "quantized"
    out.mkdir()
    quantize_model(tiny, out, find_scheme("int4-rtn"), threads=1)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to write into."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
