"""One tiny model and its float32 export for all tests of the runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny import write_tiny_model


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.graphs.export import export_model

    out = tmp_path_factory.mktemp("exported")
    export_model(tiny, out, float_storage="float32")
    return out / "model"


@pytest.fixture(scope="package")
def pictures() -> list[Image.Image]:
    """Noise of several shapes: split, unsplit, wide, gray."""
    random = np.random.default_rng(5)
    sizes = [(48, 70, 3), (20, 20, 3), (9, 200, 3), (130, 64, 3)]
    images = [Image.fromarray(random.integers(0, 256, s, dtype=np.uint8)) for s in sizes]
    return [*images, images[0].convert("L")]
