"""BERT and DistilBERT as encoders of text, with a classification head where the checkpoint has one.

TinyBERT and BioClinicalBERT are BERTs of other sizes. Heads of pre-training are left out (see
`families.layouts.bert`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.config import choice, count, flag, positive
from exporter.families.layouts.bert import (
    BARE,
    BARE_NAMES,
    BERT,
    DISTILBERT,
    OLD_NAMES,
    SEQUENCE,
    TOKEN,
    bert_config,
    bert_left_out,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import SAVE_TOKENIZER, PublishedLayout
from exporter.families.prompts.bert import BertTexts, label_count, read_bert_texts, read_labels
from exporter.families.shapes.text import bert, distilbert
from exporter.families.specs.bert import (
    BERT_NAMES,
    DISTILBERT_NAMES,
    BertSpec,
    HeadSpec,
    TextEncoderSpec,
)
from exporter.families.tasks import ENCODER_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPES = (BERT, DISTILBERT)
TASK: Task = "text-encoder"
# Heads by what architectures says.
TORCH_CLASSES = {
    **{kind: f"exporter.families.reference.bert:{name}" for kind, name in BARE.items()},
    **{name: name for heads in (SEQUENCE, TOKEN) for name in heads.values()},
}
PUBLISHED = {
    kind: PublishedLayout(
        bert_config, NameMap(OLD_NAMES[kind]), SAVE_TOKENIZER, left_out=bert_left_out
    )
    for kind in MODEL_TYPES
}
LAYOUTS = tuple(
    Layout(
        (kind,),
        (*BARE_NAMES[kind], *OLD_NAMES[kind]),
        embedding=f"{kind}.embeddings.word_embeddings.weight",
    )
    for kind in MODEL_TYPES
)
SHAPES = {BERT: bert, DISTILBERT: distilbert}
# BertConfig's and DistilBertConfig's, whose names differ where their values do.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
    "activation": "gelu",
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# The layer before the classifier of whole texts, and what stands behind it.
DENSE = {BERT: ("bert.pooler.dense", "tanh"), DISTILBERT: ("pre_classifier", "relu")}
DISTILBERT_EPS = 1e-12


def bert_spec(config: Mapping[str, Any], prefix: str, where: str) -> BertSpec:
    """The encoder of BERT's part of a config.json, with BertConfig's defaults; `prefix` has its dot.

    Raises `InputRefused` on a bad config and for a BERT that is no plain encoder.
    """
    choice(config, "position_embedding_type", "absolute", ("absolute",), where)
    for key in ("is_decoder", "add_cross_attention"):
        if flag(config, key, False):
            raise InputRefused(f"config.json: {where}.{key} is true; expected an encoder")
    return _checked(
        BertSpec(
            hidden_size=count(config, "hidden_size", 768, where),
            layers=count(config, "num_hidden_layers", 12, where),
            heads=count(config, "num_attention_heads", 12, where),
            intermediate_size=count(config, "intermediate_size", 3072, where),
            vocab_size=count(config, "vocab_size", 30522, where),
            max_positions=count(config, "max_position_embeddings", 512, where),
            type_vocab_size=count(config, "type_vocab_size", 2, where),
            norm_eps=positive(config, "layer_norm_eps", 1e-12, where),
            activation=choice(config, "hidden_act", "gelu", ACTIVATIONS, where),
            prefix=prefix,
            names=BERT_NAMES,
        ),
        where,
    )


def distilbert_spec(config: Mapping[str, Any], prefix: str, where: str) -> BertSpec:
    """The same for DistilBERT, which calls its sizes otherwise. Raises `InputRefused`."""
    return _checked(
        BertSpec(
            hidden_size=count(config, "dim", 768, where),
            layers=count(config, "n_layers", 6, where),
            heads=count(config, "n_heads", 12, where),
            intermediate_size=count(config, "hidden_dim", 3072, where),
            vocab_size=count(config, "vocab_size", 30522, where),
            max_positions=count(config, "max_position_embeddings", 512, where),
            type_vocab_size=0,
            norm_eps=DISTILBERT_EPS,
            activation=choice(config, "activation", "gelu", ACTIVATIONS, where),
            prefix=prefix,
            names=DISTILBERT_NAMES,
        ),
        where,
    )


def encoder_spec(config: Mapping[str, Any]) -> TextEncoderSpec:
    """Encoder and head of a parsed config.json. Raises `InputRefused` on a bad config."""
    config = bert_config(config)
    kind = str(config["model_type"])
    read = distilbert_spec if kind == DISTILBERT else bert_spec
    (declared,) = config["architectures"]
    head = None
    if declared == TOKEN[kind]:
        head = HeadSpec(label_count(config))
    elif declared == SEQUENCE[kind]:
        head = HeadSpec(label_count(config), *DENSE[kind])
    return TextEncoderSpec(read(config, f"{kind}.", "config"), head)


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """The one graph of the encoder. Raises `InputRefused` on a bad parsed config.json."""
    return {ENCODER_GRAPH: encoder_spec(config)}


def open_preparer(model_dir: Path) -> BertTexts:
    """Tokenizer and labels of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    spec = encoder_spec(config)
    bert = spec.bert
    pad = config.get("pad_token_id")
    return read_bert_texts(
        model_dir,
        bert.vocab_size,
        bert.max_positions,
        types=bool(bert.names.types),
        pad_id=pad if type(pad) is int and pad >= 0 else 0,
        labels=() if spec.head is None else read_labels(config, spec.head.labels),
    )


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:  # noqa: ARG001 (there is one)
    """``last_hidden_state``, or ``logits`` of a head, by transformers' forward."""
    import torch

    found = model(**{name: torch.from_numpy(values) for name, values in feed.items()})
    name = "logits" if "logits" in found else "last_hidden_state"
    return {name: found[name].numpy()}


def _checked(spec: BertSpec, where: str) -> BertSpec:
    if spec.hidden_size % spec.heads:
        raise InputRefused(
            f"config.json: {where} has hidden size {spec.hidden_size} and {spec.heads} heads; expected a "
            "multiple"
        )
    return spec
