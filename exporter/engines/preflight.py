"""Before a site says that it is ready: are these engines for this machine and these graphs?

Nothing in TensorRT tells it beforehand, and its own validity check lets changed files pass: so the
records are compared with the machine, digests with the files, and then every engine is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.engines.golden import read_self_test
from exporter.engines.record import EngineRecord, graph_digests, read_record, this_system
from exporter.runtimes.trt import PARTS, SUFFIX, TrtCaptioner
from exporter.runtimes.trt_api import parse_version, version_of
from exporter.runtimes.trt_engine import REBUILD, RuntimeOptions
from exporter.runtimes.trt_memory import DeviceFacts, DeviceMemory


def preflight(
    model_dir: Path, folder: Path, trt: Any, device: DeviceFacts
) -> tuple[EngineRecord, ...]:
    """Records of the engines in `folder`, when they are for this machine and the graphs of `model_dir`.

    Raises `InputRefused` with the first reason why not.
    """
    if not folder.is_dir():
        raise InputRefused(f"{folder}: no engines for {device.name} here; {REBUILD}")
    records = tuple(read_record(folder, part) for part in PARTS)
    for record in records:
        for found in differences(record, model_dir, folder, version_of(trt), device):
            raise InputRefused(f"{folder}: engine '{record.part}' {found}; {REBUILD}")
    tested = read_self_test(folder)
    if tested.engines != {r.part: r.digests.engine for r in records}:
        raise InputRefused(f"{folder}: the self-test was of other engines; {REBUILD}")
    if not tested.passed:
        raise InputRefused(f"{folder}: the engines did not pass their self-test; {REBUILD}")
    return records


def open_engines(model_dir: Path, folder: Path, trt: Any, memory: DeviceMemory) -> TrtCaptioner:
    """A captioner over engines that pass the preflight. Raises `InputRefused` when one does not."""
    records = preflight(model_dir, folder, trt, memory.facts)
    return load_engines(model_dir, folder, trt, memory, records)


def load_engines(
    model_dir: Path,
    folder: Path,
    trt: Any,
    memory: DeviceMemory,
    records: tuple[EngineRecord, ...],
) -> TrtCaptioner:
    """Load engines as their records say they were built."""
    # A version-compatible engine brings code; it is allowed only for engines with a record.
    code = any(r.options.version_compatible for r in records)
    return TrtCaptioner(model_dir, folder, trt, memory, RuntimeOptions(host_code=code))


def differences(
    record: EngineRecord, model_dir: Path, folder: Path, tensorrt: str, device: DeviceFacts
) -> Iterator[str]:
    """Why an engine is not for this machine, these graphs, or not what was built."""
    built = record.device
    if (built.name, built.compute_capability) != (device.name, device.compute_capability):
        yield (
            f"is for {built.name} ({built.compute_capability}), this is {device.name} "
            f"({device.compute_capability})"
        )
    if record.system != this_system():
        yield f"is for {record.system}, this is {this_system()}"
    if not _version_fits(record, tensorrt):
        newer = " or later" if record.options.version_compatible else ""
        yield f"is for TensorRT {record.tensorrt}{newer}, this is {tensorrt}"
    graph = model_dir / "onnx" / f"{record.part}.onnx"
    if not graph.is_file():
        yield f"is of a graph that is not here ({graph})"
        return
    digests = graph_digests(graph)
    if digests[0] != record.digests.graph:
        yield f"is of another graph than {graph.name} (SHA-256 differs)"
    if digests[1] != record.digests.data:
        yield f"is of other weights than {graph.name}_data (SHA-256 differs)"
    path = folder / f"{record.part}{SUFFIX}"
    if not path.is_file():
        yield f"is missing ({path.name})"
    elif sha256_file(path) != record.digests.engine:
        yield f"was changed after it was built (SHA-256 of {path.name} differs)"


def _version_fits(record: EngineRecord, tensorrt: str) -> bool:
    if record.options.version_compatible:
        return parse_version(record.tensorrt) <= parse_version(tensorrt)
    return record.tensorrt == tensorrt
