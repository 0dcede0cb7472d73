"""The decoder graph with key and value buffers that it reads and writes in place.

Each buffer is allocated once per call at the length that can be reached, and bound both as
``past_key_values`` and as ``present``: GroupQueryAttention then appends in place instead of copying
the whole cache for every token.
"""

from __future__ import annotations

import re

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.core.errors import InputRefused

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
DTYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A loaded decoder_model_merged.onnx."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Read the layout from the graph's inputs. Raises `InputRefused` when it is another one."""
        self.session = session
        inputs = {i.name: i for i in session.get_inputs()}
        self.past = [n for n in inputs if PAST.fullmatch(n)]
        needed = {"inputs_embeds", "attention_mask", "num_logits_to_keep"}
        outputs = {o.name: o for o in session.get_outputs()}
        presents = {self.present(n) for n in self.past} | {"logits"}
        if not self.past or inputs.keys() - self.past != needed or outputs.keys() != presents:
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
        self.vocabulary = vocabulary

    @staticmethod
    def present(past: str) -> str:
        """Output name that belongs to the input name `past`."""
        return past.replace("past_key_values", "present", 1)

    def start(self, capacity: int, keep: int) -> DecoderRun:
        """Begin a text of at most `capacity` positions; each `feed` returns the last `keep` logits."""
        return DecoderRun(self, capacity, keep)


class DecoderRun:
    """One text being decoded, batch 1."""

    def __init__(self, decoder: Decoder, capacity: int, keep: int) -> None:
        self._decoder, self._capacity, self._length = decoder, capacity, 0
        self._mask = np.ones((1, capacity), np.int64)
        self._keep = np.array(keep, np.int64)
        self._logits: NDArray[np.float32] = np.empty((1, keep, decoder.vocabulary), np.float32)
        shape = (1, decoder.heads, capacity, decoder.head_dim)
        self.buffers = {name: np.zeros(shape, decoder.dtype) for name in decoder.past}
        self._binding = decoder.session.io_binding()
        self._bind_input("num_logits_to_keep", self._keep)
        for name, buffer in self.buffers.items():
            self._bind_input(name, buffer)
            self._bind_output(decoder.present(name), buffer)
        self._bind_output("logits", self._logits)

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
        self._bind_input("attention_mask", self._mask[:, : self._length])
        self._decoder.session.run_with_iobinding(self._binding)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
