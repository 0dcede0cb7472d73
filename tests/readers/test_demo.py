"""The demo model's export, with its adapter merged, in every reader, on images of its held-out set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.adapters.merge import merge_adapters
from exporter.calibrate.sets import open_set
from exporter.catalog.profiles import find_model
from exporter.core.data import data_root
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES
from exporter.runtimes.images import open_image
from tests.readers.exchange import (
    HERE,
    Expected,
    Task,
    ask,
    expected,
    stop_ids,
    without_stop,
)

pytestmark = pytest.mark.slow
IMAGES = 24


@pytest.fixture(scope="module")
def demo_task() -> Task:
    profile = find_model("demo")
    samples = open_set(profile.evaluation).samples
    chosen = samples[:: max(1, len(samples) // IMAGES)][:IMAGES]
    images = tuple(open_image(s.image_path) for s in chosen)
    return Task(images, profile.prompts.default, profile.max_new_tokens)


@pytest.fixture(scope="module", params=["fp16", "int8", "int4-rtn"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    builtin = find_model("demo").builtin
    assert builtin is not None
    root = data_root("profiles")
    folder = tmp_path_factory.mktemp(f"demo-{request.param}")
    merged, quantized, out = (folder / name for name in ("merged", "quantized", "exported"))
    for path in (merged, quantized, out):
        path.mkdir()
    adapters = [root / place for place in builtin.adapters.values()]
    merge_adapters(root / builtin.model, adapters, merged)
    scheme = SCHEMES[request.param]
    if scheme.quantizes:
        quantize_model(merged, quantized, scheme, threads=1)
    export_model(quantized if scheme.quantizes else merged, out)
    return out / "model"


@pytest.fixture(scope="module")
def ours(demo: Path, demo_task: Task) -> Expected:
    answer = expected(demo, demo_task)
    assert all(answer.stopped), "each caption of the demo ends by itself"
    return answer


def test_plain_onnxruntime(demo: Path, demo_task: Task, ours: Expected, tmp_path: Path) -> None:
    command = (sys.executable, "-I", HERE / "plain_reader.py")
    answers = ask(command, demo, demo_task, ours.inputs, tmp_path)
    assert [tuple(a["tokens"]) for a in answers] == list(ours.tokens)


def test_onnxruntime_genai(
    demo: Path, demo_task: Task, ours: Expected, genai: Path, tmp_path: Path
) -> None:
    command = (genai, HERE / "genai" / "caption.py")
    answers = ask(command, demo, demo_task, ours.inputs, tmp_path)
    stops = stop_ids(demo)
    assert [without_stop(a["tokens"], stops) for a in answers] == list(ours.tokens)


def test_transformers_js(
    demo: Path,
    demo_task: Task,
    ours: Expected,
    transformers_js: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    answers = ask(("node", transformers_js), demo, demo_task, ours.inputs, tmp_path)
    assert [tuple(a["given"]["tokens"]) for a in answers] == list(ours.tokens)
    assert [a["given"]["text"].strip() for a in answers] == list(ours.texts)
    same = sum(tuple(a["own"]["tokens"]) == t for a, t in zip(answers, ours.tokens, strict=True))
    record_property("same_captions_with_its_own_pixels", f"{same} of {len(answers)}")
    # Its pixels differ a little (docs/readers.md), so some captions may.
    assert same > len(answers) // 2
