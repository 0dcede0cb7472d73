"""BERT's graphs, with each head and as a text tower, against transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from exporter.core.errors import InputRefused
from exporter.families.specs.bert_towers import BertText
from exporter.families.task_models import bert
from exporter.graphs.bert import write_text_encoder
from exporter.graphs.bert_text import write_bert_text
from exporter.graphs.weights import WeightSource
from tests.support.tiny_bert import LABELS, bert_sizes, random_bert, spread, write_tiny_bert

torch.set_num_threads(1)
TOLERANCE = 1e-4
HEADS = (
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertForTokenClassification"),
)


def run(path: Path, feed: Any) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def close(found: Any, expected: Any) -> bool:
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "architecture"), HEADS)
def test_logits_equal_transformers(tmp_path, kind, architecture):
    names = dict(enumerate(LABELS))
    folder = write_tiny_bert(
        tmp_path, kind=kind, architecture=architecture, id2label=names, num_labels=3
    )
    config = json.loads((folder / "config.json").read_text())
    model, spec = random_bert(config, 0), bert.encoder_spec(config)
    weights = WeightSource(folder, "float32")
    write_text_encoder(folder, "model", spec, weights, 0)
    assert weights.finish() == {}
    texts = bert.open_preparer(folder).texts(["Chest X-ray, frontal", "effusion " * 90, "a"])
    for feed in (*spec.example_feeds(np.random.default_rng(0)), texts):
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
            expected = model(**tensors).logits.numpy()
        assert close(run(folder / "model.onnx", feed)["logits"], expected)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations(tmp_path, activation):
    folder = write_tiny_bert(
        tmp_path, architecture="BertForTokenClassification", hidden_act=activation
    )
    config = json.loads((folder / "config.json").read_text())
    model, spec = random_bert(config, 0), bert.encoder_spec(config)
    write_text_encoder(folder, "model", spec, WeightSource(folder, "float32"), 0)
    (*_, feed) = spec.example_feeds(np.random.default_rng(1))
    with torch.inference_mode():
        expected = model(**{n: torch.from_numpy(v) for n, v in feed.items()}).logits.numpy()
    assert close(run(folder / "model.onnx", feed)["logits"], expected)


def tower(folder: Path, averaged: tuple[int, ...], limits: tuple[float, float] | None) -> Any:
    """A text tower's spec, its torch parts, and its written graph."""
    config = bert_sizes(90)
    model = BertModel(BertConfig(**config)).eval()
    spread(model, 3)
    matrix = torch.randn(20, config["hidden_size"], generator=torch.Generator().manual_seed(4))
    tensors = {f"text.{n}": t for n, t in model.state_dict().items() if "pooler" not in n}
    tensors |= {"head.weight": matrix, "scale": torch.tensor(7.0)}
    save_file(tensors, folder / "model.safetensors")
    encoder = bert.bert_spec(config, "text.", "text_config")
    spec = BertText(encoder, averaged, (("head.weight", 20),), "scale", limits)
    weights = WeightSource(folder, "float32")
    write_bert_text(folder, "text_model", spec, weights, 0)
    assert weights.finish() == {}
    return spec, model, matrix


@pytest.mark.parametrize("averaged", [(), (1, 2), (0, 1, 2)])
def test_text_towers(tmp_path, averaged):
    spec, model, matrix = tower(tmp_path, averaged, None)
    for feed in spec.example_feeds(np.random.default_rng(0)):
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
            states = model(**tensors, output_hidden_states=True).hidden_states
            pooled = states[-1][:, 0]
            if averaged:
                pooled = torch.stack([states[i] for i in averaged]).mean((0, 2))
        found = run(tmp_path / "text_model.onnx", feed)
        assert close(found["text_embeds"], (pooled @ matrix.T).numpy())


@pytest.mark.parametrize(("limits", "expected"), [(None, 7.0), ((0.0, 4.5), 4.5)])
def test_the_temperature_is_kept_within_its_limits(tmp_path, limits, expected):
    spec, *_ = tower(tmp_path, (), limits)
    (feed, *_) = spec.example_feeds(np.random.default_rng(0))
    found = run(tmp_path / "text_model.onnx", feed)["logit_scale"]
    assert found.shape == ()
    assert found == pytest.approx(np.exp(expected), rel=1e-6)


def test_a_missing_tensor_is_named(tmp_path):
    folder = write_tiny_bert(tmp_path, architecture="BertForTokenClassification")
    config = json.loads((folder / "config.json").read_text())
    spec = bert.encoder_spec({**config, "num_hidden_layers": 3})
    with pytest.raises(InputRefused, match=r"no tensor 'bert.encoder.layer.2") as caught:
        write_text_encoder(folder, "model", spec, WeightSource(folder, "float32"), 0)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("*.onnx*"))
