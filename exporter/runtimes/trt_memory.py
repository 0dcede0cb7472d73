"""What the TensorRT runtime needs of a GPU: memory, copies, a stream and captured graphs.

A small protocol, so that everything above it runs in tests on memory of the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

# What `IExecutionContext::setTensorAddress` asks of every address (NvInferRuntime.h).
ALIGNMENT = 256


class DeviceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU: its name, compute capability ("8.7"), memory in bytes, the driver's own version where
    the system tells it, and the CUDA version that the driver is for ("13.0").
    """

    name: str
    compute_capability: str
    memory: int
    driver: str
    cuda: str

    @property
    def slug(self) -> str:
        """A folder name for engines of this kind of GPU: ``nvidia-l4-sm89``."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{plain}-sm{self.compute_capability.replace('.', '')}"


class DeviceMemory(Protocol):
    """One GPU with one stream, on which everything runs in the order it is asked for.

    Addresses are integers. Every method raises `EnvironmentLacks` when the driver refuses.
    """

    @property
    def facts(self) -> DeviceFacts:
        """Which GPU this is."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the stream, not the default one."""
        ...

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, at least 256-byte aligned."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device; it may be changed when this returns."""
        ...

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Fill a contiguous array from the device; waits for all that was asked for before."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Set `size` bytes to zero."""
        ...

    def copy_rows(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` rows of `width` bytes that begin `source_pitch` and `target_pitch` apart."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> int:
        """Record what `enqueue` puts on the stream, without running it; returns a handle."""
        ...

    def launch(self, graph: int) -> None:
        """Run what was captured."""
        ...

    def drop(self, graph: int) -> None:
        """Free what was captured."""
        ...


class Buffers:
    """Named allocations that grow when more is asked for; the content is lost when they do."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._held: dict[str, tuple[int, int]] = {}

    def get(self, name: str, size: int) -> int:
        """Address of at least `size` bytes (at least one: empty tensors need an address too)."""
        address, held = self._held.get(name, (0, 0))
        if held >= max(size, 1):
            return address
        if held:
            del self._held[name]
            self._memory.free(address)
        address = self._memory.allocate(max(size, 1))
        self._held[name] = (address, max(size, 1))
        return address

    def close(self) -> None:
        """Free everything."""
        while self._held:
            self._memory.free(self._held.popitem()[1][0])


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A zeroed host array, not empty, at an address that TensorRT takes for values it reads there."""
    size = max(int(np.prod(shape)) * dtype.itemsize, 1)
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    used = int(np.prod(shape)) * dtype.itemsize
    return raw[start : start + used].view(dtype).reshape(shape)
