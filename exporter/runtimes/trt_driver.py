"""The CUDA driver by ctypes: the only file that calls CUDA.

libcuda.so.1 comes with every NVIDIA driver, Jetson's too, so that no package is needed beside
TensorRT, and the library's version does not depend on the toolkit's. Prototypes and the layout of
CUDA_MEMCPY2D are cuda.h's of CUDA 12.9. Not run on hardware: see docs/engines.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from exporter.core.errors import EnvironmentLacks
from exporter.runtimes.trt_memory import DeviceFacts

LIBRARY = "libcuda.so.1"
VERSION_FILE = Path("/proc/driver/nvidia/version")
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NON_BLOCKING, THREAD_LOCAL, DEVICE = (
    1,
    1,
    2,
)  # CU_STREAM_*, CU_STREAM_CAPTURE_MODE_*, CU_MEMORYTYPE_*
Pointer = c_ulonglong  # CUdeviceptr


class Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("srcXInBytes", c_size_t),
        ("srcY", c_size_t),
        ("srcMemoryType", c_int),
        ("srcHost", c_void_p),
        ("srcDevice", Pointer),
        ("srcArray", c_void_p),
        ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t),
        ("dstY", c_size_t),
        ("dstMemoryType", c_int),
        ("dstHost", c_void_p),
        ("dstDevice", Pointer),
        ("dstArray", c_void_p),
        ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    )


PROTOTYPES: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(Pointer), c_size_t),
    "cuMemFree_v2": (Pointer,),
    "cuMemcpyHtoDAsync_v2": (Pointer, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, Pointer, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (POINTER(Memcpy2D), c_void_p),
    "cuMemsetD8Async": (Pointer, c_ubyte, c_size_t, c_void_p),
}


class CudaDriver:
    """`DeviceMemory` of one GPU. Belongs to the thread that made it."""

    def __init__(self, library: Any = None, *, device: int = 0) -> None:
        """Take the GPU number `device`; `library` is for tests, by default the driver's own.

        Raises `EnvironmentLacks` without a driver or a GPU.
        """
        self._library = open_driver() if library is None else library
        for name, types in PROTOTYPES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, c_int
        self._call("cuInit", 0)
        count = c_int()
        self._call("cuDeviceGetCount", count)
        if count.value <= device:
            raise EnvironmentLacks(
                f"the NVIDIA driver shows {count.value} GPUs; TensorRT needs one"
            )
        handle, context, stream = c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGet", handle, device)
        self._device = handle.value
        # The primary context is the one that TensorRT's own calls use.
        self._call("cuDevicePrimaryCtxRetain", context, self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", stream, NON_BLOCKING)
        self._stream = int(stream.value or 0)
        self._facts = self._describe()

    @property
    def facts(self) -> DeviceFacts:
        """Which GPU this is."""
        return self._facts

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream

    def close(self) -> None:
        """Give up the stream and the GPU; nothing of this object may be used after it."""
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def allocate(self, size: int) -> int:
        """See `DeviceMemory.allocate`."""
        address = Pointer()
        self._call("cuMemAlloc_v2", address, size, what=f"{size / 1e6:.1f} MB of GPU memory")
        return int(address.value)

    def free(self, address: int) -> None:
        """See `DeviceMemory.free`."""
        self._call("cuStreamSynchronize", self._stream)
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """See `DeviceMemory.upload`: the driver has read pageable memory when the call returns."""
        _need_contiguous(array)
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """See `DeviceMemory.download`."""
        _need_contiguous(array)
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def clear(self, address: int, size: int) -> None:
        """See `DeviceMemory.clear`."""
        self._call("cuMemsetD8Async", address, 0, size, self._stream)

    def copy_rows(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int
    ) -> None:
        """See `DeviceMemory.copy_rows`."""
        asked = Memcpy2D(
            srcMemoryType=DEVICE, srcDevice=source, srcPitch=source_pitch,
            dstMemoryType=DEVICE, dstDevice=target, dstPitch=target_pitch,
            WidthInBytes=width, Height=rows,
        )  # fmt: skip
        self._call("cuMemcpy2DAsync_v2", asked, self._stream)

    def capture(self, enqueue: Callable[[], None]) -> int:
        """See `DeviceMemory.capture`."""
        graph, ready = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, THREAD_LOCAL)
        try:
            enqueue()
        finally:  # the stream is of no use until the capture ends
            self._call("cuStreamEndCapture", self._stream, graph)
        self._call("cuGraphInstantiateWithFlags", ready, graph, 0)
        self._call("cuGraphDestroy", graph)
        return int(ready.value or 0)

    def launch(self, graph: int) -> None:
        """See `DeviceMemory.launch`."""
        self._call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: int) -> None:
        """See `DeviceMemory.drop`."""
        self._call("cuStreamSynchronize", self._stream)
        self._call("cuGraphExecDestroy", graph)

    def _describe(self) -> DeviceFacts:
        name = ctypes.create_string_buffer(256)
        major, minor, version, memory = c_int(), c_int(), c_int(), c_size_t()
        self._call("cuDeviceGetName", name, len(name), self._device)
        self._call("cuDeviceGetAttribute", major, MAJOR, self._device)
        self._call("cuDeviceGetAttribute", minor, MINOR, self._device)
        self._call("cuDeviceTotalMem_v2", memory, self._device)
        self._call("cuDriverGetVersion", version)
        return DeviceFacts(
            name=name.value.decode("utf-8", "replace"),
            compute_capability=f"{major.value}.{minor.value}",
            memory=int(memory.value),
            driver=driver_version(),
            cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def _call(self, name: str, *arguments: Any, what: str = "") -> None:
        # Numbers that the driver fills in and structures go by reference.
        given = [
            ctypes.byref(a) if isinstance(t, type) and issubclass(t, ctypes._Pointer) else a
            for a, t in zip(arguments, PROTOTYPES[name], strict=True)
        ]
        code = int(getattr(self._library, name)(*given))
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else "unknown error"
            about = f" for {what}" if what else ""
            raise EnvironmentLacks(f"CUDA driver: {name}{about}: {said} ({code})")


def open_driver(name: str = LIBRARY) -> ctypes.CDLL:
    """The driver's library. Raises `EnvironmentLacks` where there is none."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise EnvironmentLacks(
            f"no NVIDIA driver here ({name} does not load); TensorRT engines are built and run on the "
            "machine with the GPU, elsewhere use the ONNX graphs"
        ) from error


def driver_version(path: Path = VERSION_FILE) -> str:
    """The driver's version as the kernel module tells it; "unknown" where it does not (Jetson)."""
    try:
        words = path.read_text(encoding="utf-8").split("\n")[0].split()
    except OSError:
        return "unknown"
    return next((w for w in words if w[0].isdigit() and "." in w), "unknown")


def _need_contiguous(array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous")
