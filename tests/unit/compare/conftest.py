"""Small real models and cases for the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.core.cases import Case

PROMPT = "Describe this medical image."


@dataclass(frozen=True)
class Models:
    """One tiny model: as it is, exported in float32 and float16, quantized, and another one."""

    source: Path
    fp32: Path
    fp16: Path
    int8_weights: Path
    int8: Path
    other_source: Path
    other: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from exporter.graphs.export import export_model
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import SCHEMES
    from tests.support.tiny import write_tiny_model

    root = tmp_path_factory.mktemp("models")

    def export(source: Path, name: str, storage: str) -> Path:
        out = root / name
        out.mkdir()
        export_model(source, out, float_storage=storage)  # type: ignore[arg-type]
        return out / "model"

    source, other = write_tiny_model(root / "source"), write_tiny_model(root / "other", seed=1)
    quantized = root / "quantized"
    quantized.mkdir()
    quantize_model(source, quantized, SCHEMES["int8"], threads=1)
    return Models(
        source=source,
        fp32=export(source, "fp32", "float32"),
        fp16=export(source, "fp16", "float16"),
        int8_weights=quantized,
        int8=export(quantized, "int8", "float16"),
        other_source=other,
        other=export(other, "other-fp16", "float16"),
    )


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ...]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    made = []
    for index in range(4):
        path = folder / f"{index}.png"
        shape = (60 + 8 * index, 90 - 12 * index, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
        truth = f"CT with a {10 + index} mm nodule in the left lung. No effusion."
        made.append(Case(f"c{index}", path, f"p{index // 2}", ("ct", "mri")[index % 2], truth))
    return tuple(made)
