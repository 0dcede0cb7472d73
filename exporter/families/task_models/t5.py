"""T5 (arXiv 1910.10683): text to text, here summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.config import count
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import SAVE_TOKENIZER, PublishedLayout
from exporter.families.prompts.textfiles import read_optional, read_tokenizer, stop_ids
from exporter.families.shapes.text import t5
from exporter.families.specs.t5 import (
    LEFT_OUT,
    T5Decoder,
    T5Encoder,
    newest_config,
    t5_copies,
    t5_sizes,
)
from exporter.families.tasks import (
    SEQ2SEQ_DECODER,
    SEQ2SEQ_ENCODER,
    GraphSpec,
    Outputs,
    SummarySettings,
    Task,
)

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("t5",)
TASK: Task = "summary"
TORCH_CLASSES = {"t5": "T5ForConditionalGeneration"}
# Names are transformers' own; its config says two things by one key.
PUBLISHED = {
    "t5": PublishedLayout(
        newest_config,
        NameMap(()),
        SAVE_TOKENIZER,
        left_out=lambda _: LEFT_OUT,
        copies=t5_copies,
    )
}
LAYOUTS = (Layout(MODEL_TYPES, (), embedding="shared.weight", head="lm_head.weight"),)
SHAPES = {"t5": t5}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "d_model": 512,
    "d_ff": 2048,
    "d_kv": 64,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    # Not read by the class: what the published tokenizer and checkpoints are made for.
    "n_positions": 512,
}
# Texts that the published checkpoints were trained with; relative positions have no bound of their own.
POSITIONS = 512


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """See `families.tasks.TaskFamily`."""
    sizes = t5_sizes(config)
    return {SEQ2SEQ_ENCODER: T5Encoder(sizes), SEQ2SEQ_DECODER: T5Decoder(sizes)}


@dataclass(frozen=True)
class T5Preparer:
    """`families.tasks.SummaryPreparer` for one model folder."""

    tokenizer: Tokenizer
    end: int
    vocabulary: int
    settings: SummarySettings

    def text(self, text: str) -> Feed:
        """``input_ids`` and ``attention_mask`` int64 ``[1, length]``, the end token last.

        Raises `InputRefused` for a text longer than those of the model's training.
        """
        ids = self.tokenizer.encode(text).ids
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        limit = self.settings.max_positions
        if len(ids) > limit:
            raise InputRefused(
                f"the text takes {len(ids)} tokens, the model has {limit}; shorten it"
            )
        if max(ids) >= self.vocabulary:
            raise InputRefused(
                f"tokenizer.json gives token {max(ids)}, config.json has a vocabulary of "
                f"{self.vocabulary}; they belong to different models"
            )
        found = np.array([ids], np.int64)
        return {"input_ids": found, "attention_mask": np.ones_like(found)}

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        text: str = self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text.strip()


def open_preparer(model_dir: Path) -> T5Preparer:
    """Tokenizer, start and end tokens of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    vocabulary = t5_sizes(config).vocab_size
    tokenizer = read_tokenizer(model_dir)
    stops = stop_ids(model_dir, config, tokenizer)
    declared = {**config, **read_optional(model_dir / "generation_config.json")}
    start = declared.get("decoder_start_token_id")
    if type(start) is not int or not 0 <= start < vocabulary:
        raise InputRefused(
            f"{model_dir / 'config.json'}: decoder_start_token_id is {start!r}; expected a token of the "
            f"vocabulary of {vocabulary}"
        )
    limit = count(config, "n_positions", POSITIONS, "config")
    settings = SummarySettings(start, stops, limit)
    # Texts end with the first of the declared ends, as the tokenizer's own template puts it.
    return T5Preparer(tokenizer, min(stops), vocabulary, settings)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """See `families.tasks.TaskFamily`: out of the caches that transformers' own forward fills."""
    import torch

    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
    return _encoded(model, tensors) if graph == SEQ2SEQ_ENCODER else _decoded(model, tensors)


def _encoded(model: Any, feed: Mapping[str, torch.Tensor]) -> Outputs:
    start = feed["input_ids"].new_zeros((len(feed["input_ids"]), 1))
    cache = model(**feed, decoder_input_ids=start, use_cache=True).past_key_values
    return _parts("cross_key_values", cache.cross_attention_cache)


def _decoded(model: Any, feed: Mapping[str, torch.Tensor]) -> Outputs:
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    own, cross = DynamicCache(), DynamicCache()
    for layer in range(len(model.decoder.block)):
        past, seen = (
            (feed[f"{name}.{layer}.key"], feed[f"{name}.{layer}.value"])
            for name in ("past_key_values", "cross_key_values")
        )
        cross.update(*seen, layer)
        if past[0].shape[2]:
            own.update(*past, layer)
    mask = feed["encoder_attention_mask"]
    # Says how long the text is: its keys and values are in the cache.
    states = seen[0].new_zeros((*mask.shape, model.config.d_model))
    out = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=feed["input_ids"],
        past_key_values=EncoderDecoderCache(own, cross),
        use_cache=True,
    )
    keep = int(feed["num_logits_to_keep"])
    logits = {"logits": out.logits[:, -keep:].numpy()}
    return {**logits, **_parts("present", out.past_key_values.self_attention_cache)}


def _parts(name: str, cache: Any) -> dict[str, Any]:
    return {
        f"{name}.{i}.{part}": values.numpy()
        for i, layer in enumerate(cache.layers)
        for part, values in (("key", layer.keys), ("value", layer.values))
    }
