"""A stand-in for libcuda.so.1 on the host's memory; it takes what ctypes would be given."""
# ruff: noqa: N802 (the functions have the names of the driver's)

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from exporter.runtimes.trt_driver import (
    DEVICE,
    MAJOR,
    MINOR,
    NON_BLOCKING,
    PROTOTYPES,
    THREAD_LOCAL,
)
from tests.support.host_memory import HostMemory

OUT_OF_MEMORY, NOT_PERMITTED = 2, 800


class FakeLibcuda:
    """Functions of the driver as attributes; `fails` maps names to the code they answer with."""

    def __init__(self, memory: HostMemory, *, devices: int = 1) -> None:
        self.memory, self.devices = memory, devices
        self.fails: dict[str, int] = {}
        self.calls: list[str] = []
        self._captured: list[Callable[[], None]] = []
        self._ready: dict[int, list[Callable[[], None]]] = {}
        for name in PROTOTYPES:
            setattr(self, name, self._function(name))

    def _function(self, name: str) -> Callable[..., int]:
        inner = getattr(self, f"_{name}")

        def function(*arguments: Any) -> int:
            assert function.restype is ctypes.c_int
            assert len(arguments) == len(function.argtypes), name
            self.calls.append(name)
            if name in self.fails:
                return self.fails[name]
            # What is passed by reference comes as byref(x).
            inner(*[getattr(a, "_obj", a) for a in arguments])
            return 0

        return function

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDriverGetVersion(self, version: Any) -> None:
        major, minor = (int(n) for n in self.memory.facts.cuda.split("."))
        version.value = major * 1000 + minor * 10

    def _cuGetErrorString(self, error: int, text: Any) -> None:
        text.value = {OUT_OF_MEMORY: b"out of memory"}.get(error, b"operation not permitted")

    def _cuDeviceGetCount(self, count: Any) -> None:
        count.value = self.devices

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device.value = ordinal

    def _cuDeviceGetName(self, name: Any, length: int, device: int) -> None:
        name.value = self.memory.facts.name.encode()

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        major, minor = (int(n) for n in self.memory.facts.compute_capability.split("."))
        value.value = {MAJOR: major, MINOR: minor}[attribute]

    def _cuDeviceTotalMem_v2(self, size: Any, device: int) -> None:
        size.value = self.memory.facts.memory

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context.value = 99

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None: ...

    def _cuCtxSetCurrent(self, context: Any) -> None:
        assert context.value == 99

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == NON_BLOCKING
        stream.value = self.memory.stream

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert stream == self.memory.stream

    def _cuStreamDestroy_v2(self, stream: int) -> None: ...

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert (stream, mode) == (self.memory.stream, THREAD_LOCAL)
        self.memory._recording = []

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        self._captured, self.memory._recording = self.memory._recording, None
        graph.value = 1

    def _cuGraphInstantiateWithFlags(self, ready: Any, graph: Any, flags: int) -> None:
        ready.value = 1000 + len(self._ready)
        self._ready[ready.value] = self._captured
        self.memory.captures += 1

    def _cuGraphLaunch(self, ready: int, stream: int) -> None:
        self.memory.launches += 1
        for work in self._ready[ready]:
            work()

    def _cuGraphDestroy(self, graph: Any) -> None: ...

    def _cuGraphExecDestroy(self, ready: int) -> None:
        self._ready[ready] = []

    def _cuMemAlloc_v2(self, address: Any, size: int) -> None:
        address.value = self.memory.allocate(size)

    def _cuMemFree_v2(self, address: int) -> None:
        self.memory.free(address)

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> None:
        self.memory.check(target, size)
        ctypes.memmove(target, source, size)

    def _cuMemcpyDtoHAsync_v2(self, target: int, source: int, size: int, stream: int) -> None:
        self.memory.check(source, size)
        ctypes.memmove(target, source, size)

    def _cuMemcpy2DAsync_v2(self, asked: Any, stream: int) -> None:
        assert asked.srcMemoryType == asked.dstMemoryType == DEVICE
        self.memory.copy_rows(
            asked.srcDevice, asked.srcPitch, asked.dstDevice, asked.dstPitch,
            asked.WidthInBytes, asked.Height,
        )  # fmt: skip

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        assert value == 0
        self.memory.clear(address, size)


def bytes_at(address: int, size: int) -> np.ndarray:
    """What lies at an address."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
