"""What every runtime gives: captions with their times, and logits for given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

# What the vision graph gives: rows ``[rows, hidden]`` for the places of the image tokens, or, for a
# decoder with cross-attention, its keys and values ``[1, heads, rows, head_dim]`` by the graphs' names.
Features = NDArray[np.float32] | Mapping[str, NDArray[np.float32]]


def feature_rows(features: Features) -> NDArray[np.float32]:
    """Features as rows: cross keys and values side by side, ``[rows, layers * 2 * hidden]``."""
    if not isinstance(features, Mapping):
        return features
    parts = [np.swapaxes(part[0], 0, 1).reshape(part.shape[2], -1) for part in features.values()]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Timing:
    """Seconds: image and prompt preparation, vision part, prefill to the first token, each later token."""

    prepare: float
    vision: float
    prefill: float
    decode: tuple[float, ...]

    @property
    def first_token(self) -> float:
        """Time to first token: preparation, vision and prefill."""
        return self.prepare + self.vision + self.prefill

    @property
    def total(self) -> float:
        """The whole caption."""
        return self.first_token + sum(self.decode)


@dataclass(frozen=True)
class Caption:
    """A greedy answer. `tokens` has no stop token; `stopped` is False when the length ran out."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool
    prompt_tokens: int
    timing: Timing


class Captioner(Protocol):
    """One loaded model. Not safe for use by several threads."""

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        """Greedy caption of one image."""
        ...

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits ``[len(tokens) + 1, vocab]``: row t predicts ``tokens[t]``.

        The last row predicts what follows them (the stop token, as a rule).
        """
        ...
