"""What a merge is proven on: random inputs of a torch model, and all that it gives for them.

A captioner gives logits; a model of a task family gives the outputs of each of its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.families.config import image_token
from exporter.families.table import FAMILIES, family_of, task_family_of
from exporter.families.tasks import TaskFamily

Outputs = Mapping[str, NDArray[np.float32]]
TEXT_TOKENS = 24


@dataclass(frozen=True)
class Probe:
    """`run` gives the outputs of a torch model by name; `tiles`: random images among its inputs."""

    kind: Literal["logits", "outputs"]
    run: Callable[[Any], Outputs]
    tiles: int


def probe_for(config: Mapping[str, Any], seed: int) -> Probe:
    """The probe of a model by its parsed config.json, as the newest class has it."""
    task = task_family_of(config)
    return _captioner(config, seed) if task is None else _task(task, config, seed)


def difference(ours: Outputs, theirs: Outputs) -> float:
    """Largest difference of an output over its largest value, in the worst of all outputs."""
    return max(
        float(np.abs(ours[name] - values).max() / np.abs(values).max())
        for name, values in theirs.items()
    )


def agreement(ours: Outputs, theirs: Outputs) -> float | None:
    """Share of positions where the same token is the most likely; None without logits of tokens."""
    if theirs.keys() != {"logits"}:
        return None
    return float((ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)).mean())


def _task(family: TaskFamily, config: Mapping[str, Any], seed: int) -> Probe:
    feeds = [
        (graph, feed)
        for graph, spec in family.graphs(config).items()
        for feed in spec.example_feeds(np.random.default_rng(seed))
    ]

    def run(model: Any) -> Outputs:
        with torch.inference_mode():
            return {
                f"{graph}.{place}.{name}": values
                for place, (graph, feed) in enumerate(feeds)
                for name, values in family.torch_outputs(model, graph, feed).items()
            }

    tiles = sum(len(feed["pixel_values"]) for _, feed in feeds if "pixel_values" in feed)
    return Probe("outputs", run, tiles)


def _captioner(config: Mapping[str, Any], seed: int) -> Probe:
    """Random tokens, behind two random image tiles where the family has them."""
    generator = np.random.default_rng(seed)
    text = config.get("text_config") or config.get("decoder") or config
    image = image_token(config)
    allowed = np.setdiff1d(np.arange(int(text["vocab_size"])), [-1 if image is None else image])
    ids = generator.choice(allowed, TEXT_TOKENS)
    families = {kind for family in FAMILIES.values() for kind in family.MODEL_TYPES}
    inputs, tiles = {"input_ids": torch.from_numpy(ids[None])}, 0
    if config.get("model_type") in families:
        arrays, tiles = family_of(config).proof_inputs(config, generator, ids)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def run(model: Any) -> Outputs:
        with torch.inference_mode():
            return {"logits": model(**inputs, use_cache=False).logits.float().numpy()}

    return Probe("logits", run, tiles)
