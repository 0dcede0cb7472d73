"""BLEURT (Sellam et al. 2020) from a folder in the layout of its PyTorch ports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.captions.base import Pair, Tally, mean_tally
from exporter.compare.captions.encoder import (
    TextEncoder,
    embedding_rows,
    folder_tensors,
    load_module,
    open_tokenizer,
    require_torch,
)
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config

PREFIXES = ("bleurt.", "bert.")
HEAD = ("classifier.weight", "classifier.bias")


class Bleurt:
    """`CaptionMetric`: the regression of (ground truth, caption); about 0..1, not bounded.

    The body is BERT, or for BLEURT-20 and its distilled ones BERT with smaller embeddings and a
    projection (RemBERT); the head is one linear unit on the pooled first token. BLEURT has a number for
    blank texts too; two blank captions count as 1 here.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises `InputRefused`, or `EnvironmentLacks` without torch."""
        require_torch()
        config = read_config(folder / "config.json")
        if config.get("model_type") not in ("bleurt", "bert"):
            raise InputRefused(
                f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}; expected "
                "'bleurt' or 'bert', the layouts of BLEURT's PyTorch ports"
            )
        tensors = folder_tensors(folder)
        self._weight, self._bias = (_head(folder, tensors, name) for name in HEAD)
        kind, settings, body = _body(config, tensors)
        model = load_module(kind, settings, body, folder)
        tokenizer = open_tokenizer(folder, embedding_rows(model))
        limit = min(512, int(config.get("max_position_embeddings") or 512))
        self._encoder = TextEncoder(tokenizer, model, settings, limit)
        self.how = f"{config.get('num_hidden_layers')} layers, ground truth first, raw regression"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figure bleurt."""
        import torch

        rows = self._encoder.tokenize_pairs([(p.truth, p.said) for p in pairs])
        scores = np.zeros(len(pairs))
        for places, inputs in self._encoder.batches(rows):
            with torch.inference_mode():
                pooled = self._encoder.model(**inputs).pooler_output
                scores[places] = (pooled @ self._weight.T + self._bias)[:, 0].numpy()
        blank = [not p.truth.strip() and not p.said.strip() for p in pairs]
        return {"bleurt": mean_tally(np.where(blank, 1.0, scores))}


def _head(folder: Path, tensors: Mapping[str, Any], name: str) -> Any:
    found = tensors.get(name)
    if found is None or found.shape[0] != 1:
        shape = "missing" if found is None else f"of shape {list(found.shape)}"
        raise InputRefused(f"{folder}: '{name}' is {shape}; expected a head with one output")
    return found


def _body(
    config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class, settings and tensors without their prefix of the encoder below the head."""
    body = {n.removeprefix(p): t for n, t in tensors.items() for p in PREFIXES if n.startswith(p)}
    settings = dict(config)
    narrow = config.get("embedding_size")
    if narrow is None:
        return "BertModel", settings | {"model_type": "bert"}, body
    # BLEURT always projects when it names an embedding size; so does RemBERT, under another name.
    projection = "encoder.embedding_projection."
    renamed = {
        n.replace(projection, "encoder.embedding_hidden_mapping_in."): t for n, t in body.items()
    }
    return (
        "RemBertModel",
        settings | {"model_type": "rembert", "input_embedding_size": narrow},
        renamed,
    )
