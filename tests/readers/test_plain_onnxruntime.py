"""A program that knows only the layout captions as this package and the torch model do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exporter.runtimes.torch_reference import TorchCaptioner
from tests.readers.exchange import HERE, Task, ask, expected

COMMAND = (sys.executable, "-I", HERE / "plain_reader.py")


@pytest.mark.parametrize("name", ["fp16", "int8", "int4-rtn", "fp16-external"])
def test_same_inputs_and_tokens(
    exported: dict[str, Path], task: Task, tmp_path: Path, name: str
) -> None:
    ours = expected(exported[name], task)
    answers = ask(COMMAND, exported[name], task, ours.inputs, tmp_path)
    assert [a["input_ids"] for a in answers] == [i.input_ids.tolist() for i in ours.inputs]
    assert [tuple(a["tokens"]) for a in answers] == list(ours.tokens)
    assert len(set(ours.tokens)) > 1


def test_same_tokens_as_torch(
    source: Path, exported: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    torch = TorchCaptioner(source, threads=1)
    captions = [torch.caption(i, task.prompt, task.max_new_tokens) for i in task.images]
    inputs = expected(exported["fp16"], task).inputs
    answers = ask(COMMAND, exported["fp16"], task, inputs, tmp_path)
    assert [tuple(a["tokens"]) for a in answers] == [c.tokens for c in captions]
    # The first one ends at a stop token, others at the limit.
    assert captions[0].stopped
    assert not all(c.stopped for c in captions)
