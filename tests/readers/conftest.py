"""Exported folders for the readers, and the readers themselves, installed once per checkout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.graphs import writer
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.readers.exchange import Task
from tests.readers.install import genai_python, node_folder
from tests.support.tiny import write_tiny_model

PROMPT = "Describe this medical image."
# Square, wide, tall, exact tiles, much larger and smaller than the tiles.
SIZES = ((64, 64), (100, 60), (40, 90), (32, 32), (300, 200), (20, 17))
# Name: scheme, and whether weights lie in data files beside the graphs, as large ones do.
STORED = {
    "fp16": ("fp16", False),
    "int8": ("int8", False),
    "int4-rtn": ("int4-rtn", False),
    "fp16-external": ("fp16", True),
}


def blurred_noise(width: int, height: int, seed: int) -> Image.Image:
    """An image without sharp edges, so that resizing by other code gives similar pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def task() -> Task:
    """Six images of different shapes, one prompt, 24 tokens."""
    images = tuple(blurred_noise(*size, seed) for seed, size in enumerate(SIZES))
    return Task(images, PROMPT, 24)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Path:
    """A tiny float model that has two stop tokens; one of them ends the first image's caption."""
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("readers") / "source")
    tokens = TorchCaptioner(folder, threads=1).caption(task.images[0], PROMPT, 24).tokens
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["eos_token_id"] = [settings["eos_token_id"], tokens[8]]
    path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def exported(source: Path) -> dict[str, Path]:
    """The exported ``model/`` folders: float16 storage, 8 bits, 4 bits, and with data files."""
    folders = {}
    for name, (scheme, external) in STORED.items():
        origin = source
        if SCHEMES[scheme].quantizes:
            origin = source.parent / f"quantized-{name}"
            origin.mkdir()
            quantize_model(source, origin, SCHEMES[scheme], threads=1)
        out = source.parent / f"exported-{name}"
        out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if external:
                patch.setattr(writer, "INLINE_LIMIT", 10_000)
            export_model(origin, out)
        assert (out / "model/onnx/decoder_model_merged.onnx_data").exists() == external
        folders[name] = out / "model"
    return folders


@pytest.fixture(scope="session")
def transformers_js() -> Path:
    """Folder with caption.mjs and its packages; skips without node, npm or network."""
    return node_folder()


@pytest.fixture(scope="session")
def genai() -> Path:
    """A Python with onnxruntime-genai; skips without network."""
    return genai_python()
