"""A BERT as the text half of a model that matches images and texts: one vector per text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from exporter.catalog.schema import Value
from exporter.families.base import Feed, TensorSpec
from exporter.families.specs.bert import BertSpec

SCALE = "temperature: one number"
# BertConfig's, which published configs of such models leave out.
BERT_DEFAULTS: Mapping[str, Value] = {
    "text_config.model_type": "bert",
    "text_config.hidden_size": 768,
    "text_config.intermediate_size": 3072,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 12,
    "text_config.max_position_embeddings": 512,
    "text_config.type_vocab_size": 2,
    "text_config.layer_norm_eps": 1e-12,
}


@dataclass(frozen=True)
class BertText:
    """An encoder, what is made of its states, and matrices without bias with a GELU between them.

    `averaged`: numbers of the hidden states (0 before the first block) that are averaged, each over
    all places of the text with its padding, as MedCLIP does; empty takes the first token of the last
    states. `projections`: whole name and outputs of each matrix. `scale_limits` bounds the logarithm
    of the temperature that `logit_scale` names; without a name the graph has no such output.
    """

    bert: BertSpec
    averaged: tuple[int, ...]
    projections: tuple[tuple[str, int], ...]
    logit_scale: str = "logit_scale"
    scale_limits: tuple[float, float] | None = None

    @property
    def output_size(self) -> int:
        """Width of a text's vector."""
        return self.projections[-1][1]

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of encoder, projections and temperature."""
        yield from self.bert.tensors()
        inputs = self.bert.hidden_size
        for name, outputs in self.projections:
            yield TensorSpec(name, (outputs, inputs), "decoder")
            inputs = outputs
        if self.logit_scale:
            yield TensorSpec(self.logit_scale, (), reason=SCALE)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random texts of two shapes, one of them with padding."""
        return self.bert.example_feeds(rng, types=False)
