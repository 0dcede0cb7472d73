"""The CUDA driver behind ctypes: prototypes, the copy structure, errors; on a stand-in library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from exporter.core.errors import EnvironmentLacks
from exporter.runtimes.trt_driver import (
    PROTOTYPES,
    CudaDriver,
    Memcpy2D,
    driver_version,
    open_driver,
)
from exporter.runtimes.trt_memory import Buffers, aligned
from tests.support.fake_cuda import OUT_OF_MEMORY, FakeLibcuda
from tests.support.host_memory import HostMemory

# offsetof() of every member of CUDA_MEMCPY2D, compiled from cuda.h of CUDA 12.9 for x86-64.
OFFSETS = {
    "srcXInBytes": 0, "srcY": 8, "srcMemoryType": 16, "srcHost": 24, "srcDevice": 32, "srcArray": 40,
    "srcPitch": 48, "dstXInBytes": 56, "dstY": 64, "dstMemoryType": 72, "dstHost": 80,
    "dstDevice": 88, "dstArray": 96, "dstPitch": 104, "WidthInBytes": 112, "Height": 120,
}  # fmt: skip
# Number of arguments of each function in the same cuda.h.
ARGUMENTS = {
    "cuInit": 1, "cuDriverGetVersion": 1, "cuGetErrorString": 2, "cuDeviceGetCount": 1,
    "cuDeviceGet": 2, "cuDeviceGetName": 3, "cuDeviceGetAttribute": 3, "cuDeviceTotalMem_v2": 2,
    "cuDevicePrimaryCtxRetain": 2, "cuDevicePrimaryCtxRelease_v2": 1, "cuCtxSetCurrent": 1,
    "cuStreamCreate": 2, "cuStreamSynchronize": 1, "cuStreamDestroy_v2": 1,
    "cuStreamBeginCapture_v2": 2, "cuStreamEndCapture": 2, "cuGraphInstantiateWithFlags": 3,
    "cuGraphLaunch": 2, "cuGraphDestroy": 1, "cuGraphExecDestroy": 1, "cuMemAlloc_v2": 2,
    "cuMemFree_v2": 1, "cuMemcpyHtoDAsync_v2": 4, "cuMemcpyDtoHAsync_v2": 4,
    "cuMemcpy2DAsync_v2": 2, "cuMemsetD8Async": 4,
}  # fmt: skip


STUB = Path(__file__).resolve().parents[2] / "support" / "libcuda_stub.c"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library in C with the header's signatures: what ctypes passes is read as C reads it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, STUB], check=True)
    return open_driver(str(path))


@pytest.fixture
def library() -> FakeLibcuda:
    return FakeLibcuda(HostMemory())


def test_the_copy_structure_is_laid_out_as_the_header_says() -> None:
    assert {n: getattr(Memcpy2D, n).offset for n, _ in Memcpy2D._fields_} == OFFSETS
    assert ctypes.sizeof(Memcpy2D) == 128


def test_prototypes_have_the_headers_arguments() -> None:
    assert {n: len(types) for n, types in PROTOTYPES.items()} == ARGUMENTS


def test_it_says_which_gpu_this_is(library: FakeLibcuda) -> None:
    facts = CudaDriver(library).facts
    assert (facts.name, facts.compute_capability, facts.cuda) == ("NVIDIA Test 1000", "8.9", "13.0")
    assert facts.memory == 24 << 30 and facts.slug == "nvidia-test-1000-sm89"


def test_bytes_go_there_and_back(library: FakeLibcuda) -> None:
    driver = CudaDriver(library)
    sent = np.arange(24, dtype=np.float32).reshape(4, 6)
    source, target = driver.allocate(sent.nbytes), driver.allocate(sent.nbytes)
    driver.upload(source, sent)
    driver.clear(target, sent.nbytes)
    # Columns 1 and 2 of each row, to columns 3 and 4.
    driver.copy_rows(source + 4, 24, target + 12, 24, 8, 4)
    got = np.empty_like(sent)
    driver.download(target, got)
    expected = np.zeros_like(sent)
    expected[:, 3:5] = sent[:, 1:3]
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="not contiguous"):
        driver.upload(source, sent[:, ::2])
    driver.free(source)
    driver.free(target)
    driver.close()
    assert library.memory.blocks == {}


def test_ctypes_passes_what_c_reads(compiled: ctypes.CDLL) -> None:
    driver = CudaDriver(compiled)
    facts = driver.facts
    assert (facts.name, facts.compute_capability, facts.cuda) == ("Stub é GPU", "8.7", "12.9")
    assert facts.memory == 80 << 30 and driver.stream == 0x7FFF12345678
    sent = np.arange(20, dtype=np.int16).reshape(4, 5)
    source, target = driver.allocate(40), driver.allocate(40)
    driver.upload(source, sent)
    driver.clear(target, 40)
    driver.copy_rows(source + 2, 10, target, 10, 6, 4)
    got = np.empty_like(sent)
    driver.download(target, got)
    np.testing.assert_array_equal(got[:, :3], sent[:, 1:4])
    assert not got[:, 3:].any()
    graph = driver.capture(lambda: None)
    driver.launch(graph)
    driver.drop(graph)
    with pytest.raises(EnvironmentLacks, match=r"GPU memory: out of memory \(2\)"):
        driver.allocate(1 << 50)
    driver.free(source)
    driver.free(target)
    driver.close()


def test_work_is_captured_without_being_done(library: FakeLibcuda) -> None:
    driver, done = CudaDriver(library), []
    graph = driver.capture(lambda: library.memory.run(lambda: done.append(1)))
    assert done == []
    driver.launch(graph)
    driver.launch(graph)
    assert done == [1, 1]
    driver.drop(graph)


def test_a_capture_ends_also_when_the_work_fails(library: FakeLibcuda) -> None:
    driver = CudaDriver(library)

    def fail() -> None:
        raise EnvironmentLacks("TensorRT does not run engine 'x'")

    with pytest.raises(EnvironmentLacks, match="does not run"):
        driver.capture(fail)
    assert "cuStreamEndCapture" in library.calls
    assert "cuGraphInstantiateWithFlags" not in library.calls


def test_a_refusal_is_one_line_with_the_function_and_the_size(library: FakeLibcuda) -> None:
    driver = CudaDriver(library)
    library.fails["cuMemAlloc_v2"] = OUT_OF_MEMORY
    with pytest.raises(
        EnvironmentLacks, match=r"cuMemAlloc_v2 for 5.0 MB of GPU memory: out of memory \(2\)"
    ):
        driver.allocate(5_000_000)


def test_without_a_driver_or_a_gpu_the_environment_lacks_it() -> None:
    with pytest.raises(EnvironmentLacks, match="no NVIDIA driver here.*use the ONNX graphs"):
        open_driver("libcuda-that-is-not-there.so.1")
    with pytest.raises(EnvironmentLacks, match="0 GPUs"):
        CudaDriver(FakeLibcuda(HostMemory(), devices=0))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC version:",
            "550.54.14",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
            "580.65.06",
        ),
        ("something else", "unknown"),
    ],
)
def test_the_kernel_module_tells_the_drivers_version(
    text: str, version: str, tmp_path: Path
) -> None:
    path = tmp_path / "version"
    path.write_text(text)
    assert driver_version(path) == version
    assert driver_version(tmp_path / "none") == "unknown"


def test_buffers_grow_and_keep_their_address_while_they_fit() -> None:
    memory = HostMemory()
    buffers = Buffers(memory)
    first = buffers.get("a", 100)
    assert buffers.get("a", 40) == first and len(memory.blocks) == 1
    buffers.get("a", 400)
    assert [len(b) for b in memory.blocks.values()] == [400]
    assert buffers.get("empty", 0) in memory.blocks
    buffers.close()
    assert memory.blocks == {}


@pytest.mark.parametrize("shape", [(), (3,), (5, 7)])
def test_host_values_lie_at_aligned_addresses(shape: tuple[int, ...]) -> None:
    array = aligned(shape, np.dtype(np.int64))
    assert array.ctypes.data % 256 == 0 and array.shape == shape
    array[...] = 3
    assert (array == 3).all()
