"""A tiny model, its float16 graphs, and prompts embedded with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.core.cases import Case
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.table import family_of
from tests.support.tiny import write_tiny_model

PROMPT = "Describe this medical image."
CAPTIONS = ("Chest X-ray, frontal view.", "Axial CT of the abdomen shows a 19 mm lesion.", None)


@pytest.fixture(scope="package")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="package")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.graphs.export import export_model

    out = tmp_path_factory.mktemp("exported")
    export_model(merged, out)
    return out / "model"


@pytest.fixture(scope="package")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("images")
    made = []
    for i, caption in enumerate(CAPTIONS):
        values = np.random.default_rng(i).integers(0, 255, (40 + 8 * i, 56), np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(values).save(path)
        made.append(Case(f"c{i}", path, f"p{i}", "x-ray", caption))
    return made


@pytest.fixture(scope="package")
def prompts(merged: Path, exported: Path, cases: list[Case]) -> list[EmbeddedPrompt]:
    return embed_prompts(merged, exported, cases, PROMPT, threads=1, max_answer=6)


@pytest.fixture(scope="package")
def checkpoint(merged: Path) -> Checkpoint:
    return Checkpoint.open(merged)


@pytest.fixture(scope="package")
def spec(merged: Path) -> DecoderSpec:
    config = read_config(merged / "config.json")
    return family_of(config).decoder_spec(config)
