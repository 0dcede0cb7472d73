"""One tiny model in the standard dialect, and its bundle, for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tensorrt_site import Site, install, write_bundle, write_standard
from tests.support.tiny import write_tiny_model


@pytest.fixture(scope="package")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return write_standard(write_tiny_model(folder / "model"), folder / "exported")


@pytest.fixture(scope="package")
def bundle(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(exported, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return install(monkeypatch)
