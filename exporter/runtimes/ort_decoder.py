"""The decoder graph with key and value buffers that it reads and writes in place.

Each buffer is allocated once per call at the length that can be reached, and bound both as
``past_key_values`` and as ``present``: GroupQueryAttention then appends in place instead of copying
the whole cache for every token. A graph of standard operators puts past and new ones together in a
new buffer, which its past then becomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.visible import VisibleImages
from exporter.runtimes.greedy import Positions

POSITIONS = "position_ids"
PREFIX = "prefix_length"
IMAGE_MASK = "image_attention_mask"
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
CROSS = re.compile(r"cross_key_values\.(\d+)\.(key|value)")
DTYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A loaded decoder_model_merged.onnx."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Read the layout from the graph's inputs. Raises `InputRefused` when it is another one."""
        self.session = session
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
        self.buffers = self._buffers(0 if decoder.concatenates else capacity)
        self._binding = decoder.session.io_binding()
        self._bind_input("num_logits_to_keep", self._keep)
        for name, buffer in self.buffers.items():
            self._bind_input(name, buffer)
            if not decoder.concatenates:
                self._bind_output(decoder.present(name), buffer)
        self._bind_output("logits", self._logits)
        # Kept as an attribute: onnxruntime gets the addresses only.
        self._cross = {n: np.ascontiguousarray(a, np.float32) for n, a in cross.items()}
        for name, array in self._cross.items():
            self._bind_input(name, array)

    def feed(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append ``[length, hidden]`` embeddings; returns logits ``[keep, vocab]`` of the last ones.

        The result is overwritten by the next call. Raises ValueError when the buffers are full.
        """
        if self._length + len(embeds) > self._capacity:
            raise ValueError(f"{self._length + len(embeds)} positions in {self._capacity}")
        self._length += len(embeds)
        # Kept as an attribute: onnxruntime gets the address only.
        self._embeds = np.ascontiguousarray(embeds[None], np.float32)
        self._bind_input("inputs_embeds", self._embeds)
        if self._decoder.positioned:
            places = self._positions.take(len(embeds))
            if places is None:
                raise ValueError("the decoder takes position_ids; the prompt has none")
            self._places = np.ascontiguousarray(places[:, None], np.int64)
            self._bind_input(POSITIONS, self._places)
        if self._decoder.masked:
            rows = self._visible.take(len(embeds))
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
        longer = self._buffers(self._length)
        for name, buffer in longer.items():
            self._bind_output(self._decoder.present(name), buffer)
        self._decoder.session.run_with_iobinding(self._binding)
        self.buffers = longer
        for name, buffer in longer.items():
            self._bind_input(name, buffer)

    def _buffers(self, length: int) -> dict[str, NDArray[np.floating]]:
        """Empty keys and values of `length` places by the names of their inputs."""
        shape = (1, self._decoder.heads, length, self._decoder.head_dim)
        return {name: np.zeros(shape, self._decoder.dtype) for name in self._decoder.past}

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
