"""Families whose models do not caption: what such a family tells the rest.

A task family names its graphs; each graph is a spec with its tensors, and a torch function that gives
what the graph gives. What is done with the outputs belongs to the task, not to the family
(`runtimes.tasks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.families.base import Feed, KnownFamily, TensorSpec

# zero-shot: images and texts in one space; segmentation: a mask for an image and a text;
# text-encoder: hidden states, a sentence's vector, or the scores of a classification head;
# summary: text to text.
Task = Literal["zero-shot", "segmentation", "text-encoder", "summary"]
Outputs = Mapping[str, NDArray[np.float32]]

# Graphs and outputs that the tasks look for, by the names that transformers.js reads.
VISION_GRAPH, TEXT_GRAPH, MASK_GRAPH = "vision_model", "text_model", "mask_decoder"
ENCODER_GRAPH, SEQ2SEQ_ENCODER, SEQ2SEQ_DECODER = "model", "encoder_model", "decoder_model_merged"


class GraphSpec(Protocol):
    """One graph of a task family. `graphs.task_parts` has a writer for each kind."""

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it uses. One that several graphs use is described alike by all of them.

        Linear layers that see pixels have role "vision", those that see text "decoder".
        """
        ...

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two or more shapes."""
        ...


class TaskFamily(KnownFamily, Protocol):
    """The module-level names of a task family's file; torch only inside what the build side calls."""

    TASK: Task

    def graphs(self, config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
        """Spec of each graph by its file's stem, in the order in which they are written.

        Raises `InputRefused` on a bad parsed config.json.
        """
        ...

    def open_preparer(self, model_dir: Path) -> Any:
        """The preparer of this task (one of the Protocols below). Raises `InputRefused`."""
        ...

    def torch_outputs(self, model: Any, graph: str, feed: Feed) -> Outputs:
        """What `graph` gives for `feed`, by the torch model: output name to float32 array.

        By transformers' own methods, so that the graphs are checked against them.
        """
        ...


def task_tensors(family: TaskFamily, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Every tensor of all graphs of a model, each once, in the order of its first use.

    Raises ValueError when two graphs give a shared tensor different shapes or roles.
    """
    found: dict[str, TensorSpec] = {}
    for spec in family.graphs(config).values():
        for tensor in spec.tensors():
            if found.setdefault(tensor.name, tensor) != tensor:
                raise ValueError(f"two graphs describe tensor '{tensor.name}' differently")
    return tuple(found.values())


class ZeroShotPreparer(Protocol):
    """Images and texts to the inputs of `VISION_GRAPH` and `TEXT_GRAPH`.

    `VISION_GRAPH` gives ``image_embeds`` ``[images, size]``; `TEXT_GRAPH` gives ``text_embeds``
    ``[texts, size]`` and ``logit_scale`` ``[]`` (already exponentiated). Neither is normalised. A model
    that scores each pair by itself (SigLIP) also gives ``logit_bias`` ``[]``.
    """

    @property
    def template(self) -> str:
        """Text around a label, such as ``a photo of {}``."""
        ...

    def images(self, images: Sequence[Image]) -> Feed:
        """Inputs of the vision graph for images of any size."""
        ...

    def texts(self, texts: Sequence[str]) -> Feed:
        """Inputs of the text graph; longer texts are cut as the tokenizer says."""
        ...


class SegmentationPreparer(Protocol):
    """Images and texts to masks.

    `MASK_GRAPH` takes all that `VISION_GRAPH` gives for one image and all that `TEXT_GRAPH` gives
    (``text_embeds`` ``[texts, size]`` and, where it needs more, each text's words) by the same names,
    and gives ``logits`` ``[texts, height, width]``.
    """

    def images(self, images: Sequence[Image]) -> Feed:
        """Inputs of the vision graph for images of any size."""
        ...

    def texts(self, texts: Sequence[str]) -> Feed:
        """Inputs of the text graph."""
        ...


class TextPreparer(Protocol):
    """Texts to the inputs of `ENCODER_GRAPH`, which gives ``last_hidden_state`` ``[texts, length,
    hidden]`` or, with a classification head, ``logits`` (``[texts, labels]`` or ``[texts, length,
    labels]``).
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs; empty for an encoder without a head."""
        ...

    def texts(self, texts: Sequence[str]) -> Feed:
        """``input_ids`` and ``attention_mask`` int64 ``[texts, length]`` and what else is asked."""
        ...

    def tokens(self, text: str) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each token of `texts` for one text in characters; (0, 0) for special ones."""
        ...


@dataclass(frozen=True)
class SummarySettings:
    """How greedy decoding begins and ends."""

    start_id: int
    stop_ids: frozenset[int]
    max_positions: int


class SummaryPreparer(Protocol):
    """Text to text: `SEQ2SEQ_ENCODER` gives ``cross_key_values.{i}.key|value``, which
    `SEQ2SEQ_DECODER` takes beside ``input_ids`` and its own cache.
    """

    @property
    def settings(self) -> SummarySettings:
        """Start, stops and limits."""
        ...

    def text(self, text: str) -> Feed:
        """``input_ids`` and ``attention_mask`` int64 ``[1, length]``."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens without special tokens, stripped."""
        ...
