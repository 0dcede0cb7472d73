"""The decoder graph with key and value buffers that it reads and writes in place.

Each buffer is allocated once per call at the length that can be reached, and bound both as
``past_key_values`` and as ``present``: GroupQueryAttention then appends in place instead of copying
the whole cache for every token. A graph of standard operators puts past and new ones together in a
new buffer, which its past then becomes. Where the buffers lie is the affair of `ort_memory`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.prompts.visible import VisibleImages
from exporter.runtimes.greedy import Positions
from exporter.runtimes.ort_memory import Buffer, Buffers, HostMemory, Memory

POSITIONS = "position_ids"
PREFIX = "prefix_length"
IMAGE_MASK = "image_attention_mask"
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
CROSS = re.compile(r"cross_key_values\.(\d+)\.(key|value)")
DTYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A loaded decoder_model_merged.onnx."""

    def __init__(self, session: ort.InferenceSession, memory: Memory | None = None) -> None:
        """Read the layout from the graph's inputs; buffers lie in `memory`, by default the host's.

        Raises `InputRefused` when the layout is another one.
        """
        self.session, self.memory = session, memory or HostMemory()
        inputs = {i.name: i for i in session.get_inputs()}
        self.past = [n for n in inputs if PAST.fullmatch(n)]
        self.cross = [n for n in inputs if CROSS.fullmatch(n)]
        needed = {"inputs_embeds", "attention_mask", "num_logits_to_keep"}
        self.positioned, self.prefixed = POSITIONS in inputs, PREFIX in inputs
        self.masked = IMAGE_MASK in inputs
        outputs = {o.name: o for o in session.get_outputs()}
        presents = {self.present(n) for n in self.past} | {"logits"}
        rest = inputs.keys() - {*self.past, *self.cross, POSITIONS, IMAGE_MASK, PREFIX}
        if not self.past or rest != needed or outputs.keys() != presents:
            raise InputRefused(
                f"decoder_model_merged.onnx has inputs {sorted(inputs)[:6]}... and outputs "
                f"{sorted(outputs)[:4]}...; expected {sorted(needed)} with past and present"
            )
        kinds = {(inputs[n].type, *inputs[n].shape[1:4:2]) for n in self.past}
        vocabulary = outputs["logits"].shape[-1]
        kind, heads, width = next(iter(kinds))
        if len(kinds) != 1 or kind not in DTYPES or not isinstance(vocabulary, int):
            raise InputRefused(
                f"decoder_model_merged.onnx has past {sorted(map(str, kinds))} and a vocabulary of "
                f"{vocabulary}; expected one float shape with fixed heads and head size"
            )
        self.dtype, self.heads, self.head_dim = DTYPES[kind], int(heads), int(width)
        self.cross_dtypes = {n: DTYPES.get(inputs[n].type, np.float32) for n in self.cross}
        # Where present is as long as the mask, it is past and new ones together.
        length = outputs[self.present(self.past[0])].shape[2]
        self.concatenates = length == inputs["attention_mask"].shape[1]
        self.vocabulary = vocabulary

    @staticmethod
    def present(past: str) -> str:
        """Output name that belongs to the input name `past`."""
        return past.replace("past_key_values", "present", 1)

    def start(
        self,
        capacity: int,
        keep: int,
        positions: Positions | None = None,
        cross: Mapping[str, NDArray[np.float32]] | None = None,
        visible: VisibleImages | None = None,
        *,
        prefix_length: int = 0,
    ) -> DecoderRun:
        """Begin a text of at most `capacity` places; each `feed` returns the last `keep` logits.

        `positions` are those of the text where the graph takes ``position_ids``, `cross` the inputs of
        the names `self.cross`, `visible` the rows of its ``image_attention_mask``; `prefix_length`:
        so many of the first positions see one another. Raises ValueError without them.
        """
        given = cross or {}
        if given.keys() != set(self.cross):
            raise ValueError(f"cross inputs {sorted(given)}; expected {sorted(self.cross)}")
        if prefix_length and not self.prefixed:
            raise ValueError(
                f"{prefix_length} positions see one another; this decoder only looks back"
            )
        growing = (positions or Positions(None), visible or VisibleImages(None))
        return DecoderRun(self, capacity, keep, *growing, given, prefix_length)


class DecoderRun:
    """One text being decoded, batch 1."""

    def __init__(
        self,
        decoder: Decoder,
        capacity: int,
        keep: int,
        positions: Positions,
        visible: VisibleImages,
        cross: Mapping[str, NDArray[np.float32]],
        prefix_length: int,
    ) -> None:
        self._prefix = np.array(prefix_length, np.int64)
        self._decoder, self._capacity, self._length = decoder, capacity, 0
        self._positions, self._visible = positions, visible
        self._mask = np.ones((1, capacity), np.int64)
        self._keep = np.array(keep, np.int64)
        self._logits: NDArray[np.float32] = np.empty((1, keep, decoder.vocabulary), np.float32)
        self._host, self._memory = HostMemory(), decoder.memory
        self.buffers = self._first_buffers()
        self._binding = decoder.session.io_binding()
        self._bind_input("num_logits_to_keep", self._keep)
        for name, buffer in self.buffers.items():
            self._memory.bind_input(self._binding, name, buffer)
            if not decoder.concatenates:
                self._memory.bind_output(self._binding, decoder.present(name), buffer)
        # Logits are all that comes back from a device.
        self._host.bind_output(self._binding, "logits", self._logits)
        # Kept as an attribute: onnxruntime gets the addresses only.
        kinds = decoder.cross_dtypes
        self._cross = {
            n: self._memory.upload(a.astype(kinds[n], copy=False)) for n, a in cross.items()
        }
        for name, array in self._cross.items():
            self._memory.bind_input(self._binding, name, array)

    def feed(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append ``[length, hidden]`` embeddings; returns logits ``[keep, vocab]`` of the last ones.

        The result is overwritten by the next call. Raises ValueError when the buffers are full.
        """
        self._grow(len(embeds))
        # Kept as an attribute: onnxruntime gets the address only.
        self._embeds: Buffer = np.ascontiguousarray(embeds[None], np.float32)
        self._bind_input("inputs_embeds", self._embeds)
        return self._run(len(embeds))

    def feed_one(self, embeds: Buffer) -> NDArray[np.float32]:
        """`feed` of one embedding ``[1, 1, hidden]`` as the memory's `embed` gave it."""
        self._grow(1)
        self._embeds = embeds
        self._memory.bind_input(self._binding, "inputs_embeds", embeds)
        return self._run(1)

    def _grow(self, count: int) -> None:
        if self._length + count > self._capacity:
            raise ValueError(f"{self._length + count} positions in {self._capacity}")
        self._length += count

    def _run(self, count: int) -> NDArray[np.float32]:
        if self._decoder.positioned:
            places = self._positions.take(count)
            if places is None:
                raise ValueError("the decoder takes position_ids; the prompt has none")
            self._places = np.ascontiguousarray(places[:, None], np.int64)
            self._bind_input(POSITIONS, self._places)
        if self._decoder.masked:
            rows = self._visible.take(count)
            if rows is None:
                raise ValueError("the decoder takes image_attention_mask; the prompt has none")
            self._rows = np.ascontiguousarray(rows[None], np.int64)
            self._bind_input(IMAGE_MASK, self._rows)
        if self._decoder.prefixed:
            self._bind_input(PREFIX, self._prefix)
        self._bind_input("attention_mask", self._mask[:, : self._length])
        if self._decoder.concatenates:
            self._run_concatenating()
        else:
            self._decoder.session.run_with_iobinding(self._binding)
        self._prefix = np.array(0, np.int64)  # what follows looks back only
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _run_concatenating(self) -> None:
        shape = self._shape(self._length)
        longer = {name: self._memory.fresh(shape, self._decoder.dtype) for name in self.buffers}
        for name, buffer in longer.items():
            self._memory.bind_output(self._binding, self._decoder.present(name), buffer)
        self._decoder.session.run_with_iobinding(self._binding)
        self.buffers = longer
        for name, buffer in longer.items():
            self._memory.bind_input(self._binding, name, buffer)

    def _first_buffers(self) -> Buffers:
        """Keys and values by the names of their inputs: the whole text's, or none."""
        decoder = self._decoder
        if decoder.concatenates:
            return {
                name: self._memory.fresh(self._shape(0), decoder.dtype) for name in decoder.past
            }
        return self._memory.caches(self, decoder.past, self._shape(self._capacity), decoder.dtype)

    def _shape(self, length: int) -> tuple[int, int, int, int]:
        return (1, self._decoder.heads, length, self._decoder.head_dim)

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        """A small input from the host; onnxruntime copies it when the graph is elsewhere."""
        self._host.bind_input(self._binding, name, array)
