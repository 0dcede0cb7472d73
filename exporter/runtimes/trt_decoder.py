"""The decoder engine with keys and values that stay on the GPU.

The `standard` graph gives present = past with the new rows behind it, so that both would grow with
every token, and a CUDA graph, which holds shapes and addresses, would be good for one step only. But
its mask says of every place by itself whether it counts, and a place's position is the number of ones
before it. So a text decodes with a past of a fixed length P (a multiple of `BUCKET`) whose unused
places are masked: shapes and addresses are the same for every token, the step is captured once, and
behind each step the new rows are moved from place P to the next free place of the past. Past and
present of all layers lie in one block of memory each, so that this is one strided copy.

Not run on hardware: docs/engines.md lists what was checked and what was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import PromptInputs
from exporter.families.prompts.visible import VisibleImages
from exporter.runtimes.greedy import Positions
from exporter.runtimes.trt_engine import REBUILD, Engine
from exporter.runtimes.trt_memory import ALIGNMENT, Buffers, DeviceMemory
from exporter.runtimes.trt_replay import Replay

# The order of the decoder's optimization profiles.
PROFILES = ("prefill", "decode")
BUCKET = 256
EMBEDS, MASK, KEEP, LOGITS = "inputs_embeds", "attention_mask", "num_logits_to_keep", "logits"
POSITIONS, IMAGE_MASK, PREFIX = "position_ids", "image_attention_mask", "prefix_length"
PAST, PRESENT, CROSS = "past_key_values.", "present.", "cross_key_values."


@dataclass(frozen=True)
class CacheLayout:
    """How keys and values of all layers lie in one block: `tensors` tensors of `rows` heads each, a
    place of a head takes `width` bytes.

    `rows` is `heads` rounded up, so that every tensor begins at an aligned address at any length.
    """

    tensors: int
    heads: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of a tensor with the padding."""
        step = ALIGNMENT // gcd(ALIGNMENT, self.width)
        return -(-self.heads // step) * step

    def offset(self, tensor: int, length: int) -> int:
        """Where a tensor begins when it has `length` places."""
        return tensor * self.rows * length * self.width

    def size(self, length: int) -> int:
        """Bytes of all tensors with `length` places."""
        return self.offset(self.tensors, length)


def _nothing() -> NDArray[Any]:
    raise ValueError("nothing was run")


def bucket(capacity: int, most: int) -> int:
    """Places of the past for a text of at most `capacity` positions; `most`: what the engine takes.

    Raises `InputRefused` when the text can get longer than the engine's context.
    """
    needed = max(capacity - 1, 1)
    if needed > most:
        raise InputRefused(
            f"a text of {capacity} positions; the decoder engine was built for {most + 1}: ask for "
            f"fewer tokens, or export again with a longer context and {REBUILD}"
        )
    return min(-(-needed // BUCKET) * BUCKET, most)


class Growing:
    """The inputs that have a row for each token: positions, visible images, length of the prefix."""

    def __init__(self, inputs: PromptInputs) -> None:
        self._positions = Positions(inputs)
        self._visible = VisibleImages(inputs.image_mask)
        self._prefix = inputs.prefix_length

    def take(self, names: Sequence[str], length: int) -> dict[str, NDArray[np.int64]]:
        """Those of `names` for the next `length` places, in the graphs' shapes.

        Raises ValueError when the decoder takes one that the prompt does not have.
        """
        places, rows = self._positions.take(length), self._visible.take(length)
        found = {
            POSITIONS: None if places is None else places[:, None],
            IMAGE_MASK: None if rows is None else rows[None],
            PREFIX: np.array(self._prefix, np.int64),
        }
        self._prefix = 0  # what follows the prompt looks back only
        taken = {n: a for n in names if (a := found[n]) is not None}
        if lost := [n for n in names if n not in taken]:
            raise ValueError(f"the decoder takes {lost[0]}; the prompt has none")
        return taken


@dataclass
class _Text:
    """A text being decoded: `places` of its past, `length` so far, address of its mask."""

    places: int
    length: int
    growing: Growing
    mask: int = 0
    fetch: Callable[[], NDArray[Any]] = field(default=_nothing)


class TrtDecoder:
    """A loaded decoder_model_merged engine and the text being decoded, batch 1."""

    def __init__(self, engine: Engine, memory: DeviceMemory, *, graphs: bool = True) -> None:
        """Read the layout; `graphs`: capture the step. Raises `InputRefused` for another layout."""
        self._engine, self._memory = engine, memory
        inputs = {t.name: t for t in engine.tensors.values() if t.is_input}
        self.past = [n for n in inputs if n.startswith(PAST)]
        self.cross = [n for n in inputs if n.startswith(CROSS)]
        self._extra = [n for n in (POSITIONS, IMAGE_MASK, PREFIX) if n in inputs]
        expected = {EMBEDS, MASK, KEEP, *self.past, *self.cross, *self._extra}
        outputs = {t.name for t in engine.tensors.values() if not t.is_input}
        forms = {(inputs[n].dtype, inputs[n].shape[1], inputs[n].shape[3]) for n in self.past}
        right = inputs.keys() == expected and outputs == {LOGITS, *map(present, self.past)}
        if not right or len(forms) != 1 or engine.profiles != len(PROFILES):
            raise InputRefused(
                f"engine '{engine.name}' has inputs {sorted(inputs)[:6]}..., {len(forms)} forms of past "
                f"and {engine.profiles} profiles; expected a decoder with {' and '.join(PROFILES)}: "
                f"{REBUILD}"
            )
        dtype, heads, self._head_dim = forms.pop()
        self._layout = CacheLayout(len(self.past), heads, self._head_dim * dtype.itemsize)
        self._longest_prompt = engine.bounds(EMBEDS, 0)[1][1]
        self._longest_past = engine.bounds(self.past[0], 1)[1][2]
        self._prefill, self._step = (engine.context(i, memory) for i in range(len(PROFILES)))
        self._cache = Buffers(memory)
        # IExecutionContext::enqueueV3: an engine that streams weights is not capturable.
        refused = "the engine streams its weights" if engine.streams_weights else ""
        self._replay = Replay(memory, refused=refused or ("" if graphs else "switched off"))
        self._text: _Text | None = None

    @property
    def step_graph(self) -> str:
        """Whether the decode step is a CUDA graph, and if not, why."""
        return self._replay.note

    def start(
        self,
        embeds: NDArray[np.float32],
        capacity: int,
        keep: int,
        growing: Growing,
        cross: Mapping[str, NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Begin a text of at most `capacity` positions with a prompt ``[length, hidden]``.

        Returns the last `keep` logits ``[keep, vocab]``. Raises `InputRefused` when the prompt or the
        text is longer than the engine takes.
        """
        length = len(embeds)
        if length > self._longest_prompt:
            raise InputRefused(
                f"a prompt of {length} positions; the decoder engine was built for at most "
                f"{self._longest_prompt}: shorten it, or use the ONNX graph"
            )
        if cross.keys() != set(self.cross):
            raise ValueError(f"cross inputs {sorted(cross)}; expected {sorted(self.cross)}")
        text = _Text(bucket(max(capacity, length), self._longest_past), length, growing)
        extras = growing.take(self._extra, length)
        context, layout, width = self._prefill, self._layout, self._layout.width
        past = self._cache.get("past", layout.size(text.places))
        fresh = self._cache.get("present", layout.size(text.places + 1))
        ones, kept = np.ones((1, length), np.int64), np.array(keep, np.int64)
        given: dict[str, NDArray[Any]] = {
            EMBEDS: embeds[None],
            MASK: ones,
            KEEP: kept,
            **extras,
            **cross,
        }
        for name, array in given.items():
            context.give(name, array)
        for index, name in enumerate(self.past):
            context.resize(name, (1, layout.heads, 0, self._head_dim))
            context.bind(name, past)
            context.bind(present(name), fresh + layout.offset(index, length))
        fetch = context.receive(LOGITS)
        context.enqueue()
        # What was never written may hold anything, also NaN, which no mask hides.
        self._memory.clear(past, layout.size(text.places))
        rows, stored = layout.tensors * layout.rows, min(length, text.places)
        self._memory.copy_rows(
            fresh, length * width, past, text.places * width, stored * width, rows
        )
        logits: NDArray[np.float32] = fetch()[0].astype(np.float32, copy=False)
        shapes = {n: np.zeros_like(_one_place(n, array)) for n, array in extras.items()}
        self._prepare(text, {EMBEDS: embeds[None, :1], KEEP: np.array(1), **shapes, **cross})
        self._text = text
        return logits

    def step(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one embedding ``[1, hidden]``; returns logits ``[vocab]``.

        Raises ValueError before `start` and when the text's capacity is used up.
        """
        text = self._text
        if text is None or text.length > text.places:
            raise ValueError("step before start, or behind the last position of the text")
        context, layout, width = self._step, self._layout, self._layout.width
        given: dict[str, NDArray[Any]] = {EMBEDS: embeds[None]}
        given |= text.growing.take(self._extra, 1)
        for name, array in given.items():
            context.write(name, array.astype(self._engine.tensors[name].dtype))
        self._replay.run(context.enqueue)
        logits: NDArray[np.float32] = text.fetch()[0, -1].astype(np.float32, copy=False)
        if text.length < text.places:
            past, fresh = (self._cache.get(n, 0) for n in ("past", "present"))
            self._memory.copy_rows(
                fresh + text.places * width, (text.places + 1) * width,
                past + text.length * width, text.places * width,
                width, layout.tensors * layout.rows,
            )  # fmt: skip
            one = np.ones(1, self._engine.tensors[MASK].dtype)
            self._memory.upload(text.mask + text.length * one.itemsize, one)
        text.length += 1
        return logits

    def _prepare(self, text: _Text, given: Mapping[str, NDArray[Any]]) -> None:
        """Set shapes and addresses of the step, which stay as they are for the whole text."""
        context, layout, places = self._step, self._layout, text.places
        mask = np.zeros((1, places + 1), self._engine.tensors[MASK].dtype)
        mask[0, : text.length] = 1  # cut at the end where the prompt fills the bucket
        mask[0, places] = 1  # the new token's own place
        for name, array in {**given, MASK: mask}.items():
            context.give(name, array)
        past, fresh = (self._cache.get(n, 0) for n in ("past", "present"))
        for index, name in enumerate(self.past):
            context.resize(name, (1, layout.heads, places, self._head_dim))
            context.bind(name, past + layout.offset(index, places))
            context.bind(present(name), fresh + layout.offset(index, places + 1))
        text.fetch = context.receive(LOGITS)
        text.mask = context.addresses[MASK]
        self._replay.expect(context.state())

    def close(self) -> None:
        """Free all GPU memory of this decoder."""
        self._replay.close()
        for held in (self._prefill, self._step, self._cache):
            held.close()


def present(past: str) -> str:
    """Output name that belongs to the input name `past`."""
    return past.replace(PAST, PRESENT, 1)


def _one_place(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """A growing input as a single token has it."""
    if name == POSITIONS:
        return array[..., :1]
    return array[:, :1] if name == IMAGE_MASK else array
