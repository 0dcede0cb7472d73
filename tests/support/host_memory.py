"""A `DeviceMemory` in the host's memory: every access is checked against what was allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from exporter.core.errors import EnvironmentLacks
from exporter.runtimes.trt_memory import ALIGNMENT, DeviceFacts

FACTS = DeviceFacts("NVIDIA Test 1000", "8.9", 24 << 30, "580.65.06", "13.0")


class HostMemory:
    """Fresh memory is full of NaN, and freed memory may not be touched."""

    def __init__(self, facts: DeviceFacts = FACTS, *, capturable: bool = True) -> None:
        self.facts, self.stream = facts, 7
        self.blocks: dict[int, np.ndarray] = {}
        self._capturable = capturable
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._recording: list[Callable[[], None]] | None = None
        self.launches = self.captures = 0

    def allocate(self, size: int) -> int:
        assert size > 0
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = raw.ctypes.data + -raw.ctypes.data % ALIGNMENT
        self.blocks[address] = raw[address - raw.ctypes.data :][:size]
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def clear(self, address: int, size: int) -> None:
        self.check(address, size)
        ctypes.memset(address, 0, size)

    def copy_rows(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int
    ) -> None:
        assert width <= min(source_pitch, target_pitch)
        for row in range(rows):
            self.check(source + row * source_pitch, width)
            self.check(target + row * target_pitch, width)
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def capture(self, enqueue: Callable[[], None]) -> int:
        if not self._capturable:
            raise EnvironmentLacks("CUDA driver: cuStreamEndCapture: not permitted (900)")
        self._recording = []
        try:
            enqueue()
        finally:
            recorded, self._recording = self._recording, None
        self.captures += 1
        self._graphs[self.captures] = recorded
        return self.captures

    def launch(self, graph: int) -> None:
        self.launches += 1
        for work in self._graphs[graph]:
            work()

    def drop(self, graph: int) -> None:
        del self._graphs[graph]

    def run(self, work: Callable[[], None]) -> None:
        """What the engine puts on the stream: done at once, or recorded."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def check(self, address: int, size: int) -> None:
        """The bytes lie inside one allocation."""
        inside = any(
            start <= address and address + size <= start + len(block)
            for start, block in self.blocks.items()
        )
        assert inside, f"{size} bytes at {address:#x} are not allocated"
