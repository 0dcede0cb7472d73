"""Where keys, values and what goes between two graphs lie: numpy arrays, or OrtValues on a device.

A run binds its buffers once; onnxruntime gets addresses and copies nothing. On a device the buffers
are OrtValues that never come to the host, and those of a finished text are used for the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.runtimes.ort_session import open_session

# A numpy array on the host, an OrtValue on a device.
Buffer = Any
Buffers = dict[str, Buffer]


class Memory(Protocol):
    """Makes buffers and binds them."""

    def caches(
        self, owner: object, names: Sequence[str], shape: Sequence[int], dtype: type[np.floating]
    ) -> Buffers:
        """Finite buffers of at least that shape (dimension 2 may be longer), `owner`'s while it lives."""
        ...

    def fresh(self, shape: Sequence[int], dtype: type[np.floating]) -> Buffer:
        """A buffer to be overwritten."""
        ...

    def upload(self, array: NDArray[Any]) -> Buffer:
        """The values of `array` where graphs read them without a copy."""
        ...

    def bind_input(self, binding: ort.IOBinding, name: str, buffer: Buffer) -> None:
        """Let `name` read `buffer`, which the caller keeps alive."""
        ...

    def bind_output(self, binding: ort.IOBinding, name: str, buffer: Buffer) -> None:
        """Let `name` write `buffer`, which the caller keeps alive."""
        ...

    def embed(self, session: ort.InferenceSession, ids: NDArray[np.int64]) -> Buffer:
        """Embeddings ``[1, length, hidden]`` of ids ``[1, length]``, left where they were made."""
        ...


class HostMemory:
    """numpy arrays."""

    def caches(
        self,
        owner: object,  # noqa: ARG002 (zeroed pages cost nothing on the host, so nothing is shared)
        names: Sequence[str],
        shape: Sequence[int],
        dtype: type[np.floating],
    ) -> Buffers:
        """Zeros of exactly that shape."""
        return {name: self.fresh(shape, dtype) for name in names}

    def fresh(self, shape: Sequence[int], dtype: type[np.floating]) -> NDArray[np.floating]:
        """Zeros: pages that nobody writes are never touched."""
        return np.zeros(shape, dtype)

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """`array`, contiguous."""
        return np.ascontiguousarray(array)

    def bind_input(self, binding: ort.IOBinding, name: str, buffer: NDArray[Any]) -> None:
        """By address."""
        binding.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)

    def bind_output(self, binding: ort.IOBinding, name: str, buffer: NDArray[Any]) -> None:
        """By address."""
        binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)

    def embed(self, session: ort.InferenceSession, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """A plain run."""
        rows: NDArray[np.float32] = session.run(["inputs_embeds"], {"input_ids": ids})[0]
        return rows


class DeviceMemory:
    """OrtValues on one device; ("cpu", 0) does the same with host memory."""

    def __init__(self, kind: str, index: int = 0) -> None:
        self._device = (kind, index)
        self._spare: list[Buffers] = []
        self._embedder: tuple[ort.InferenceSession, ort.IOBinding] | None = None

    def caches(
        self, owner: object, names: Sequence[str], shape: Sequence[int], dtype: type[np.floating]
    ) -> Buffers:
        """Those of a finished text where they are long enough (their stale values are finite, and
        the attention op reads none beyond the text), else new zeros. Freed with the last user.
        """
        spare, self._spare = self._spare, []
        found = next((b for b in spare if _fits(b, names, shape)), None)
        if found is None:
            del spare  # before new ones are made: two caches may not fit
            found = {name: self.fresh(shape, dtype) for name in names}
            zeros = np.zeros(shape, dtype)
            for value in found.values():
                value.update_inplace(zeros)
        # Not at exit: by then the device may be gone.
        weakref.finalize(owner, self._keep, found).atexit = False
        return found

    def fresh(self, shape: Sequence[int], dtype: type[np.floating]) -> ort.OrtValue:
        """Not initialized."""
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, *self._device)

    def upload(self, array: NDArray[Any]) -> ort.OrtValue:
        """A copy on the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._device)

    def bind_input(self, binding: ort.IOBinding, name: str, buffer: ort.OrtValue) -> None:
        """As it lies."""
        binding.bind_ortvalue_input(name, buffer)

    def bind_output(self, binding: ort.IOBinding, name: str, buffer: ort.OrtValue) -> None:
        """As it lies."""
        binding.bind_ortvalue_output(name, buffer)

    def embed(self, session: ort.InferenceSession, ids: NDArray[np.int64]) -> ort.OrtValue:
        """The graph's output, made on the device. onnxruntime ends a run when the device is done."""
        if self._embedder is None or self._embedder[0] is not session:
            binding = session.io_binding()
            binding.bind_output("inputs_embeds", *self._device)
            self._embedder = session, binding
        binding = self._embedder[1]
        binding.bind_cpu_input("input_ids", ids)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _keep(self, buffers: Buffers) -> None:
        self._spare = [buffers]


@dataclass(frozen=True)
class Setup:
    """How sessions are opened and where what they share lies."""

    open: Callable[[Path, int], ort.InferenceSession]
    memory: Memory


def host_setup() -> Setup:
    """The CPU of this machine."""
    return Setup(open_session, HostMemory())


def _fits(buffers: Buffers, names: Sequence[str], shape: Sequence[int]) -> bool:
    if list(buffers) != list(names):
        return False
    batch, heads, length, width = next(iter(buffers.values())).shape()
    return (batch, heads, width) == (shape[0], shape[1], shape[3]) and length >= shape[2]
