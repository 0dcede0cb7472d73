"""One build of the demo model, shared by the end-to-end tests of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.pipeline.build import BuildResult, build_bundle
from exporter.pipeline.request import BuildRequest
from tests.support.reporting import Recorder

CASES = 12


def demo_request(folder: Path, **changes: object) -> BuildRequest:
    """A build of the demo model in int4, compared on a few cases."""
    values: dict[str, object] = {
        "model": "demo",
        "adapters": ("demo",),
        "scheme": "int4",
        "out": folder / "bundle",
        "offline": True,
        "limit": CASES,
        "threads": 1,
    }
    return BuildRequest(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def demo_build(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The demo build; its bundle and its work folder must not be changed by tests."""
    return build_bundle(demo_request(tmp_path_factory.mktemp("demo")), Recorder())
