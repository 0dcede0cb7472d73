"""Published checkpoints of BERT and DistilBERT: old names, missing prefixes, heads that are not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.core.errors import InputRefused

BERT, DISTILBERT = "bert", "distilbert"
# Class of an encoder without a head, and its heads by what architectures says.
BARE = {BERT: "BertModel", DISTILBERT: "DistilBertModel"}
SEQUENCE = {
    BERT: "BertForSequenceClassification",
    DISTILBERT: "DistilBertForSequenceClassification",
}
TOKEN = {BERT: "BertForTokenClassification", DISTILBERT: "DistilBertForTokenClassification"}
# Heads of pre-training, behind which the encoder is what people take.
PRETRAINED = {
    BERT: ("BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction"),
    DISTILBERT: ("DistilBertForMaskedLM",),
}
# TensorFlow's names of a layer norm's vectors, as in checkpoints converted before 2019's end.
PARTS = (("gamma", "weight"), ("beta", "bias"))
MASKED_WORDS = "masked-word and next-sentence heads of pre-training: no output uses them"
POOLER = "summary of the first token: no output uses it"
DISTILLATION = "projection to the teacher's width: used in distillation alone"


def layer_norm_names(prefix: str) -> tuple[tuple[str, str], ...]:
    """(old, newest) names of the vectors of every layer norm of a BERT behind `prefix` (with its dot)."""
    norms = (
        "embeddings.LayerNorm",
        "encoder.layer.*.attention.output.LayerNorm",
        "encoder.layer.*.output.LayerNorm",
    )
    return tuple(
        (f"{prefix}{norm}.{old}", f"{prefix}{norm}.{new}") for norm in norms for old, new in PARTS
    )


OLD_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    BERT: (
        *layer_norm_names("bert."),
        *(
            (f"cls.predictions.transform.LayerNorm.{o}", f"cls.predictions.transform.LayerNorm.{n}")
            for o, n in PARTS
        ),
    ),
    DISTILBERT: tuple(
        (f"distilbert.embeddings.LayerNorm.{o}", f"distilbert.embeddings.LayerNorm.{n}")
        for o, n in PARTS
    ),
}
# Names in checkpoints of the encoder alone, which have no prefix: not undone on the way back.
BARE_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    BERT: (
        ("embeddings", "bert.embeddings"),
        ("encoder", "bert.encoder"),
        ("pooler", "bert.pooler"),
    ),
    DISTILBERT: (
        ("embeddings", "distilbert.embeddings"),
        ("transformer", "distilbert.transformer"),
    ),
}


def bert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the class whose outputs are taken in ``architectures``.

    A config.json without it is the encoder's. Raises `InputRefused` for other heads.
    """
    kind = str(config["model_type"])
    declared = config.get("architectures") or [BARE[kind]]
    heads = (SEQUENCE[kind], TOKEN[kind])
    if len(declared) != 1 or declared[0] not in (BARE[kind], *heads, *PRETRAINED[kind]):
        raise InputRefused(
            f"config.json: architectures is {declared!r}; expected {', '.join(heads)} or an encoder "
            f"({', '.join((BARE[kind], *PRETRAINED[kind]))})"
        )
    own = declared[0] if declared[0] in heads else BARE[kind]
    return {**config, "architectures": [own]}


def bert_left_out(config: Mapping[str, Any]) -> dict[str, str]:
    """Stems of newest names that the class of `bert_config` does not have, with the reason."""
    kind = str(config["model_type"])
    (own,) = bert_config(config)["architectures"]
    if kind == DISTILBERT:
        stems = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        return dict.fromkeys(stems, MASKED_WORDS)
    pooler = {} if own == SEQUENCE[kind] else {"bert.pooler": POOLER}
    return {"cls": MASKED_WORDS, "fit_dense": DISTILLATION, "fit_denses": DISTILLATION, **pooler}
