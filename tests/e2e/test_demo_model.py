"""The demo model: small, clearly worse without its adapter, and the same on every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from exporter.calibrate.sets import ImageSet, open_set
from exporter.compare.quality.facts import extract_facts
from exporter.core.data import data_root
from exporter.core.tensors import Checkpoint
from exporter.pipeline.build import BuildResult
from exporter.runtimes.base import Captioner
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner

DEMO = data_root("profiles") / "demo"


def captions(captioner: Captioner, images: ImageSet, step: int = 1) -> list[tuple[int, ...]]:
    return [
        captioner.caption(open_image(s.image_path), images.prompt, 64).tokens
        for s in images.samples[::step]
    ]


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_set("phantoms-eval")


@pytest.fixture(scope="module")
def merged(demo_build: BuildResult) -> Path:
    return next(demo_build.work.glob("merge-*[0-9a-f]"))


@pytest.fixture(scope="module")
def reference(merged: Path, images: ImageSet) -> list[tuple[int, ...]]:
    return captions(TorchCaptioner(merged, threads=1), images)


def exported(build: BuildResult, storage: str) -> Path:
    import json

    for folder in build.work.glob("export-*[0-9a-f]"):
        report = json.loads((folder / "export.json").read_text())
        bits = set(report["bits"].values())
        if report["float_storage"] == storage and not bits & {4, 8}:
            return folder / "model"
    raise AssertionError(f"no {storage} export in {build.work}")


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_exports_say_what_torch_says_on_the_whole_evaluation_set(
    demo_build: BuildResult, images: ImageSet, reference: Sequence[tuple[int, ...]], storage: str
) -> None:
    captioner = OrtCaptioner(exported(demo_build, storage), threads=1)
    assert captions(captioner, images) == reference


def score(
    tokens: Sequence[tuple[int, ...]], images: ImageSet, model: Path, step: int = 1
) -> tuple[float, float]:
    """Share of clinical facts right, and of captions exactly as written."""
    captioner = TorchCaptioner(model, threads=1)
    right = total = exact = 0
    for found, sample in zip(tokens, images.samples[::step], strict=True):
        text = captioner.preparer.decode(found)
        expected = {f.key for f in extract_facts(sample.caption).facts}
        right += len(expected & {f.key for f in extract_facts(text).facts})
        total += len(expected)
        exact += text == sample.caption
    return right / total, exact / len(tokens)


def test_the_merged_model_is_good(
    reference: Sequence[tuple[int, ...]], images: ImageSet, merged: Path
) -> None:
    facts, exact = score(reference, images, merged)
    assert facts >= 0.95
    assert exact >= 0.85


def test_the_base_alone_is_clearly_worse(images: ImageSet) -> None:
    base = DEMO / "model"
    facts, exact = score(captions(TorchCaptioner(base, threads=1), images, 6), images, base, 6)
    assert facts < 0.7
    assert exact < 0.2


def test_it_is_small() -> None:
    checkpoint = Checkpoint.open(DEMO / "model")
    assert sum(info.nbytes // 2 for info in checkpoint.tensors.values()) <= 3_000_000
    files = [p for part in ("model", "adapter") for p in (DEMO / part).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 5_000_000


def test_card_and_profile_say_what_it_is() -> None:
    card = (DEMO / "MODEL_CARD.md").read_text()
    assert "Drawings, not medicine" in card
