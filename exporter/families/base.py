"""What a family tells the rest: its parts as small specs, and how images enter the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image


@dataclass(frozen=True)
class DecoderSpec:
    """A causal decoder of the LLaMA kind; sizes in elements, names as in the checkpoint.

    `prefix` is put before ``layers.{i}.self_attn.q_proj.weight`` and its siblings, `embedding`,
    `final_norm` and `head` are whole tensor names. `tied` says that the head is the embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    prefix: str
    embedding: str
    final_norm: str
    head: str
    tied: bool


@dataclass(frozen=True)
class TowerSpec:
    """A pre-norm vision transformer (SigLIP kind) with pixel shuffle and one projection.

    An image tile is square, `image_size` pixels; it gives ``(image_size / patch_size / shuffle)**2``
    rows of the decoder's hidden size. `prefix` is put before ``embeddings...``, ``encoder.layers.{i}...``;
    `projection` is a whole tensor name.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    norm_eps: float
    activation: str
    shuffle: int
    output_size: int
    prefix: str
    projection: str

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Rows of features per tile."""
        return (self.patches // self.shuffle) ** 2


@dataclass(frozen=True)
class PromptInputs:
    """One prompt with its images, ready for the graphs.

    input_ids: int64 ``[length]`` with one image token per feature row;
    pixel_values: float32 ``[tiles, 3, height, width]`` in the order of the image tokens.
    """

    input_ids: NDArray[np.int64]
    pixel_values: NDArray[np.float32]


@dataclass(frozen=True)
class GenerationSettings:
    """When greedy decoding stops: any of `stop_ids`, or the context is full."""

    stop_ids: frozenset[int]
    max_positions: int


class Preparer(Protocol):
    """Turns images and a prompt into inputs, and tokens into text, with one model's own files."""

    image_token_id: int
    generation: GenerationSettings

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Split, resize and normalise `images` (RGB or gray) and render the chat template."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens without special tokens, stripped."""
        ...


class Family(Protocol):
    """The module-level functions of a family's file."""

    MODEL_TYPES: tuple[str, ...]

    def decoder_spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """Spec of the decoder from a parsed config.json. Raises `InputRefused` on a bad config."""
        ...

    def tower_spec(self, config: Mapping[str, Any]) -> TowerSpec:
        """Spec of the vision part from a parsed config.json. Raises `InputRefused` on a bad config."""
        ...

    def open_preparer(self, model_dir: Path) -> Preparer:
        """Read tokenizer, template and image settings of a model folder."""
        ...
