"""CLIP's text and image graphs against transformers: ends of texts, padding, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import Feed
from exporter.families.specs.clip import clip_image, clip_text
from exporter.families.task_models.clip import torch_outputs
from exporter.graphs.task_parts import write_task_graph
from exporter.graphs.weights import WeightSource
from exporter.runtimes.torch_reference import load_model
from tests.support.tiny_clip import CONTEXT, PROJECTION, SIDE, write_tiny_clip

from .conftest import relative, session

torch.set_num_threads(1)
NAME = "text_model"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def onnx_folder(out: Path) -> Path:
    (out / "onnx").mkdir(exist_ok=True)
    return out / "onnx"


def written(folder: Path, out: Path) -> Any:
    """A session on the text graph of a folder, in float32."""
    spec = clip_text(config_of(folder))
    write_task_graph(onnx_folder(out), NAME, spec, WeightSource(folder, "float32"), 0)
    return session(out, NAME)


def expected(folder: Path, feed: Feed) -> NDArray[np.float32]:
    with torch.inference_mode():
        found = torch_outputs(load_model(folder, config_of(folder)), NAME, feed)
    embeds: NDArray[np.float32] = found["text_embeds"]
    return embeds


def texts(rows: list[list[int]], length: int, *, left: bool = False) -> Feed:
    """Rows of ids padded with 7."""
    ids = np.full((len(rows), length), 7, np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        cut = slice(length - len(row), None) if left else slice(len(row))
        ids[place, cut], mask[place, cut] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_end_of_a_text_is_taken(tmp_path: Path, legacy: bool, left: bool) -> None:
    """The first end token, or the highest id; with tokens behind it, and padding on either side."""
    base = write_tiny_clip(tmp_path / "base", legacy=legacy)
    end = config_of(base)["text_config"]["vocab_size"] - 1
    rows = [[3, 4, 5, end], [9, end, 11, 12, end, 4], [end], [8, 300, 12, end]]
    run = written(base, tmp_path)
    for length in (6, CONTEXT):
        feed = texts(rows, length, left=left)
        found = run.run(["text_embeds"], feed)[0]
        assert found.shape == (len(rows), PROJECTION)
        assert relative(found, expected(base, feed)) < 1e-5
    if not legacy:
        return
    # Without an end token the highest id counts.
    feed = texts([[3, 400, 5, 6], [8, 300, 12, 200]], 5)
    assert relative(run.run(["text_embeds"], feed)[0], expected(base, feed)) < 1e-5


def test_tokens_behind_the_end_change_nothing(tmp_path: Path) -> None:
    base = write_tiny_clip(tmp_path / "base")
    run = written(base, tmp_path)
    end = config_of(base)["text_config"]["vocab_size"] - 1
    alone, more = texts([[3, 4, end]], 3), texts([[3, 4, end, 9, 10]], 5)
    before = texts([[6, 4, end]], 3)
    one, two, other = (run.run(["text_embeds"], f)[0] for f in (alone, more, before))
    assert relative(two, one) < 1e-6
    assert relative(other, one) > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_activations(tmp_path: Path, activation: str) -> None:
    base = write_tiny_clip(
        tmp_path / "base", text={"hidden_act": activation, "layer_norm_eps": 1e-3}
    )
    feed = next(clip_text(config_of(base)).example_feeds(np.random.default_rng(3)))
    found = written(base, tmp_path).run(["text_embeds"], feed)[0]
    assert relative(found, expected(base, feed)) < 1e-5


def test_interfaces(tmp_path: Path) -> None:
    base = write_tiny_clip(tmp_path / "base")
    weights, config = WeightSource(base, "float16"), config_of(base)
    for name, spec in (("vision_model", clip_image(config)), (NAME, clip_text(config))):
        write_task_graph(onnx_folder(tmp_path), name, spec, weights, 0)
    assert weights.finish() == {}
    vision, text = (session(tmp_path, n) for n in ("vision_model", NAME))
    described = [
        [(v.name, v.type, v.shape) for v in values]
        for run in (vision, text)
        for values in (run.get_inputs(), run.get_outputs())
    ]
    assert described == [
        [("pixel_values", "tensor(float)", ["images", 3, SIDE, SIDE])],
        [("image_embeds", "tensor(float)", ["images", PROJECTION])],
        [
            ("input_ids", "tensor(int64)", ["texts", "length"]),
            ("attention_mask", "tensor(int64)", ["texts", "length"]),
        ],
        [
            ("text_embeds", "tensor(float)", ["texts", PROJECTION]),
            ("logit_scale", "tensor(float)", []),
        ],
    ]
    stored = {t.data_type for t in onnx.load(tmp_path / "onnx" / f"{NAME}.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in stored


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    base = write_tiny_clip(tmp_path / "base")
    files = []
    for turn in "ab":
        (tmp_path / turn).mkdir()
        written(base, tmp_path / turn)
        files.append((tmp_path / turn / "onnx" / f"{NAME}.onnx").read_bytes())
    assert files[0] == files[1]


def test_a_model_without_a_temperature_has_no_such_output(tmp_path: Path) -> None:
    base = write_tiny_clip(tmp_path / "base")
    spec = replace(clip_text(config_of(base)), logit_scale="")
    write_task_graph(onnx_folder(tmp_path), NAME, spec, WeightSource(base, "float32"), 0)
    outputs = session(tmp_path, NAME).get_outputs()
    assert [o.name for o in outputs] == ["text_embeds"]
    assert "logit_scale" not in {t.name for t in spec.tensors()}


def test_missing_and_other_shapes_are_refused(tmp_path: Path) -> None:
    base = write_tiny_clip(tmp_path / "base")
    spec = clip_text(config_of(base))
    for wrong in (replace(spec, vocab_size=spec.vocab_size + 1), replace(spec, layers=3)):
        with pytest.raises(InputRefused, match="expected"):
            write_task_graph(onnx_folder(tmp_path), NAME, wrong, WeightSource(base, "float32"), 0)
        assert not (tmp_path / "onnx" / f"{NAME}.onnx").exists()
        assert not (tmp_path / "onnx" / f"{NAME}.onnx_data").exists()
