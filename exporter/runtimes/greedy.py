"""The greedy loop and its clock, the same for every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import Preparer, PromptInputs
from exporter.runtimes.base import Caption, Timing

F = TypeVar("F")


class Engine(Protocol[F]):
    """The three heavy steps of a runtime; logits are arrays ``[vocab]`` of the last position."""

    def features(self, inputs: PromptInputs) -> F:
        """Image features of the prompt's images."""
        ...

    def prefill(self, inputs: PromptInputs, features: F, capacity: int) -> NDArray[np.float32]:
        """Begin a text of at most `capacity` positions with a prompt."""
        ...

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        ...


def greedy_caption(
    preparer: Preparer, engine: Engine[F], image: Image, prompt: str, max_new_tokens: int
) -> Caption:
    """Caption of at most `max_new_tokens` tokens, fewer where the context ends, with its times.

    Raises `InputRefused` on a prompt that does not fit, ValueError when `max_new_tokens` < 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    clock = [perf_counter()]
    inputs = preparer.prepare([image], prompt)
    clock.append(perf_counter())
    features = engine.features(inputs)
    clock.append(perf_counter())
    length, settings = len(inputs.input_ids), preparer.generation
    room = min(max_new_tokens, settings.max_positions - length)
    token = int(engine.prefill(inputs, features, length + room).argmax())
    clock.append(perf_counter())
    tokens: list[int] = []
    while token not in settings.stop_ids:
        tokens.append(token)
        if len(tokens) == room:
            break
        token = int(engine.step(token).argmax())
        clock.append(perf_counter())
    prepare, vision, prefill, *decode = np.diff(clock).tolist()
    return Caption(
        text=preparer.decode(tokens),
        tokens=tuple(tokens),
        stopped=token in settings.stop_ids,
        prompt_tokens=length,
        timing=Timing(prepare, vision, prefill, tuple(decode)),
    )


def forced_inputs(
    preparer: Preparer, image: Image, prompt: str, tokens: Sequence[int]
) -> PromptInputs:
    """Inputs of a prompt that `tokens` will be forced after. Raises `InputRefused` if too long."""
    inputs = preparer.prepare([image], prompt)
    length, limit = len(inputs.input_ids) + len(tokens), preparer.generation.max_positions
    if length > limit:
        raise InputRefused(
            f"prompt and {len(tokens)} tokens take {length} positions, the model has {limit}; "
            "score fewer tokens"
        )
    return inputs


def image_places(preparer: Preparer, inputs: PromptInputs, rows: int) -> NDArray[np.bool_]:
    """Where in the prompt the `rows` feature rows go. Raises `InputRefused` when the counts differ."""
    image = preparer.image_token_id
    if image is None:
        raise ValueError("the image does not stand in this model's prompt")
    places: NDArray[np.bool_] = inputs.input_ids == image
    if int(places.sum()) != rows:
        raise InputRefused(
            f"the vision part gives {rows} rows of features for {int(places.sum())} image tokens; "
            "the model and its processor settings disagree"
        )
    return places


class Positions:
    """Positions of a text as it grows: the prompt's own, then one further on all axes each time."""

    def __init__(self, inputs: PromptInputs | None) -> None:
        self._prompt = None if inputs is None else inputs.positions
        self._given = 0

    def take(self, length: int) -> NDArray[np.int64] | None:
        """The next `length` positions, int64 ``[axes, length]``; None where place is position."""
        if self._prompt is None:
            return None
        prompt, first = self._prompt, self._given
        self._given += length
        after = np.arange(first + length - max(first, prompt.shape[1]))
        start = int(prompt.max()) + 1 + max(first - prompt.shape[1], 0)
        later = np.broadcast_to(start + after, (len(prompt), len(after)))
        return np.concatenate([prompt[:, first : first + length], later], axis=1)
