"""transformers.js opens the exported folder unchanged, by its model and processor classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.readers.exchange import Expected, Task, ask, expected, mean_difference

pytestmark = pytest.mark.slow
Answered = tuple[Expected, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["fp16", "int8", "int4-rtn", "fp16-external"])
def answered(
    request: pytest.FixtureRequest,
    exported: dict[str, Path],
    task: Task,
    transformers_js: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answered:
    folder = exported[request.param]
    ours = expected(folder, task)
    work = tmp_path_factory.mktemp("transformers-js")
    answers = ask(("node", transformers_js), folder, task, ours.inputs, work)
    return ours, answers


def test_classes(answered: Answered) -> None:
    _, answers = answered
    assert {a["model"] for a in answers} == {"Idefics3ForConditionalGeneration"}
    assert {a["processor"] for a in answers} == {"Idefics3Processor"}


def test_same_tokens_from_the_same_pixels(
    answered: Answered,
) -> None:
    ours, answers = answered
    assert [tuple(a["given"]["tokens"]) for a in answers] == list(ours.tokens)
    assert [a["given"]["text"].strip() for a in answers] == list(ours.texts)
    assert any(ours.stopped)


def test_its_processor_makes_the_same_prompt(
    answered: Answered,
) -> None:
    ours, answers = answered
    for prepared, answer in zip(ours.inputs, answers, strict=True):
        assert answer["own"]["input_ids"] == prepared.input_ids.tolist()
        assert answer["own"]["shape"] == [1, *prepared.pixel_values.shape]


def test_its_processor_makes_similar_pixels(
    answered: Answered,
) -> None:
    # It resizes twice with other filters (docs/readers.md): similar, not equal.
    ours, answers = answered
    for prepared, answer in zip(ours.inputs, answers, strict=True):
        pixels = np.fromfile(answer["own"]["pixels"], "<f4")
        assert mean_difference(prepared, pixels) < 0.05
