"""The record beside each engine: what it was built from, with what, for which machine."""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

from exporter.core.artifact import write_atomic
from exporter.core.digest import canonical_json, sha256_file
from exporter.core.errors import InputRefused
from exporter.engines.options import EngineOptions
from exporter.engines.profiles import Shapes
from exporter.runtimes.trt_engine import REBUILD
from exporter.runtimes.trt_memory import DeviceFacts

SCHEMA = 1
MAX_RECORD = 4 << 20


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 of the graph file, of its external data (empty where the weights are inside), and of
    the engine file.
    """

    graph: str
    data: str
    engine: str


class TimingCacheUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Key of the timing cache, and whether it held what an earlier engine or build measured."""

    key: str
    reused: bool


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine. `types`: how many tensors of the network have each type, as TensorRT read the graph;
    `seconds`: of parsing and building; `system`: operating system and architecture.
    """

    schema: int
    part: str
    device: DeviceFacts
    tensorrt: str
    system: str
    options: EngineOptions
    profiles: dict[str, dict[str, Shapes]]
    types: dict[str, int]
    seconds: float
    bytes: int
    timing_cache: TimingCacheUse
    digests: Digests


def this_system() -> str:
    """Operating system and architecture: engines never cross them."""
    return f"{platform.system()} {platform.machine()}"


def record_path(folder: Path, part: str) -> Path:
    """Where the record of `part` lies."""
    return folder / f"{part}.json"


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write the record beside its engine."""
    write_atomic(record_path(folder, record.part), canonical_json(msgspec.to_builtins(record)))


def read_record(folder: Path, part: str) -> EngineRecord:
    """The record of `part`. Raises `InputRefused` when it is missing or not one of this schema."""
    path = record_path(folder, part)
    if not path.is_file():
        raise InputRefused(f"{path}: no engine record; {REBUILD}")
    if path.stat().st_size > MAX_RECORD:
        raise InputRefused(
            f"{path}: {path.stat().st_size} bytes; expected at most {MAX_RECORD}; {REBUILD}"
        )
    try:
        record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not an engine record ({error}); {REBUILD}") from error
    if record.schema != SCHEMA or record.part != part:
        raise InputRefused(
            f"{path}: schema {record.schema} of '{record.part}', expected {SCHEMA} of '{part}'; {REBUILD}"
        )
    return record


def graph_digests(graph: Path) -> tuple[str, str]:
    """SHA-256 of a graph file and of its external data beside it, empty without one."""
    data = graph.with_name(f"{graph.name}_data")
    return sha256_file(graph), sha256_file(data) if data.is_file() else ""
