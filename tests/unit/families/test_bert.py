"""BERT and DistilBERT: published names, configs, heads, and texts as the graph takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.layouts.bert import (
    BARE_NAMES,
    MASKED_WORDS,
    OLD_NAMES,
    POOLER,
    bert_config,
    bert_left_out,
)
from exporter.families.layouts.left_out import left_out, without
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.task_models import bert
from exporter.quantizers.plan import plan_task
from exporter.quantizers.schemes import find_scheme
from tests.support.tiny_bert import LABELS, POSITIONS, write_tiny_bert

CONFIG = {"model_type": "bert", "vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def newest(kind: str) -> Layout:
    return Layout((kind,), (*BARE_NAMES[kind], *OLD_NAMES[kind]), embedding="")


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_old_names_of_norms_and_back(tmp_path, kind):
    names = NameMap(OLD_NAMES[kind])
    architecture = {"bert": None, "distilbert": "DistilBertForMaskedLM"}[kind]
    folder = write_tiny_bert(tmp_path, kind=kind, architecture=architecture, old_names=True)
    stored = Checkpoint.open(folder)
    assert any(name.endswith(".gamma") for name in stored.tensors)
    found = stored.renamed(names.newest)
    assert not any(name.endswith((".gamma", ".beta")) for name in found.tensors)
    assert found.renamed(names.published).tensors.keys() == stored.tensors.keys()


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("bare", [False, True])
def test_exactly_the_listed_tensors_are_left(tmp_path, kind, bare):
    architecture = f"{'Bert' if kind == 'bert' else 'DistilBert'}Model" if bare else None
    folder = write_tiny_bert(
        tmp_path, kind=kind, architecture=architecture, old_names=kind == "bert"
    )
    config = config_of(folder)
    stored = Checkpoint.open(folder).renamed(newest(kind).canonical)
    reasons = left_out(stored, bert_left_out(config))
    kept = without(stored, reasons)
    (spec,) = bert.graphs(config).values()
    assert kept.tensors.keys() == {tensor.name for tensor in spec.tensors()}
    assert {n: info.shape for n, info in kept.tensors.items()} == {
        tensor.name: tensor.shape for tensor in spec.tensors()
    }
    expected = set() if kind == "distilbert" else {POOLER}
    assert set(reasons.values()) == (expected if bare else expected | {MASKED_WORDS})


def test_heads_follow_from_architectures():
    named = {"id2label": {str(i): label for i, label in enumerate(LABELS)}}
    for declared, head in (
        (None, None),
        (["BertForPreTraining"], None),
        (["BertForSequenceClassification"], (3, "bert.pooler.dense", "tanh")),
        (["BertForTokenClassification"], (3, "", "")),
    ):
        spec = bert.encoder_spec({**CONFIG, **named, "architectures": declared})
        found = spec.head and (spec.head.labels, spec.head.dense, spec.head.activation)
        assert found == head
    two = bert.encoder_spec({**CONFIG, "architectures": ["BertForTokenClassification"]})
    assert two.head.labels == 2  # transformers' default


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architectures": ["BertForQuestionAnswering"]}, "architectures is"),
        ({"architectures": ["BertModel", "BertForMaskedLM"]}, "architectures is"),
        ({"num_attention_heads": 5}, "hidden size 64 and 5 heads"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        (
            {"architectures": ["BertForTokenClassification"], "id2label": {"1": "a"}},
            "id2label is",
        ),
    ],
)
def test_other_models_are_refused_in_one_line(changed, words):
    with pytest.raises(InputRefused, match=words) as caught:
        bert.graphs({**CONFIG, **changed})
    assert "\n" not in str(caught.value)


def test_a_config_reads_the_same_once_converted():
    published = {**CONFIG, "architectures": ["BertForMaskedLM"]}
    assert bert_config(bert_config(published)) == bert_config(published)
    assert bert_config(published)["architectures"] == ["BertModel"]


def test_long_texts_are_cut_and_others_padded(tmp_path):
    folder = write_tiny_bert(tmp_path, architecture="BertModel")
    preparer = bert.open_preparer(folder)
    feed = preparer.texts(["CT", "effusion " * 100])
    assert feed["input_ids"].shape == (2, POSITIONS)
    assert feed["attention_mask"].sum(axis=1).tolist()[1] == POSITIONS
    padded = feed["attention_mask"][0] == 0
    assert padded.any()
    assert (feed["input_ids"][0][padded] == 0).all()
    assert {name: array.dtype for name, array in feed.items()} == dict.fromkeys(feed, np.int64)
    # The tokenizer may have a shorter limit than the model.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 9}))
    assert bert.open_preparer(folder).texts(["effusion " * 100])["input_ids"].shape == (1, 9)
    with pytest.raises(InputRefused, match="no text was given"):
        preparer.texts([])


def test_offsets_cut_words_out_of_the_text(tmp_path):
    preparer = bert.open_preparer(write_tiny_bert(tmp_path, architecture="BertModel"))
    text = "Axial CT: a 19 mm lesion"
    places = preparer.tokens(text)
    assert places[0] == places[-1] == (0, 0)
    assert "".join(text[a:b] for a, b in places) == text.replace(" ", "")


def test_labels_are_those_of_the_config(tmp_path):
    names = dict(enumerate(LABELS))
    folder = write_tiny_bert(
        tmp_path, architecture="BertForTokenClassification", id2label=names, num_labels=3
    )
    assert bert.open_preparer(folder).labels == LABELS
    config = config_of(folder)
    del config["id2label"], config["num_labels"]
    (folder / "config.json").write_text(json.dumps(config))
    assert bert.open_preparer(folder).labels == ("LABEL_0", "LABEL_1")


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    folder = write_tiny_bert(tmp_path, architecture="BertModel")
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**settings, "post_processor": None}))
    with pytest.raises(InputRefused, match="writes 0 tokens around a text"):
        bert.open_preparer(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_tiny_bert(tmp_path, architecture="BertModel")
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    with pytest.raises(InputRefused, match="a vocabulary of 40"):
        bert.open_preparer(folder)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4-rtn", 4)])
def test_rows_that_are_no_multiple_of_a_block(tmp_path, scheme, bits):
    """TinyBERT's heads of 26: linear layers are padded to blocks, the table of words stays float."""
    folder = write_tiny_bert(tmp_path, architecture="BertForSequenceClassification")
    config = config_of(folder)
    stored = Checkpoint.open(folder).renamed(newest("bert").canonical)
    plans = {p.name: p for p in plan_task(stored, bert, config, find_scheme(scheme))}
    words = plans["bert.embeddings.word_embeddings.weight"]
    assert (words.kind, words.reason) == ("float", "52 columns are no multiple of 16")
    linear = [p for p in plans.values() if p.kind == "linear"]
    # Six layers in each of two blocks, the pooler's and the classifier.
    assert len(linear) == 14
    assert {p.format.bits for p in linear} == {bits}
