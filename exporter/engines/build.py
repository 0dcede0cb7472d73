"""Builds an engine from each graph of the `standard` dialect, on the machine that will run it.

Written against the TensorRT 10 and 11 Python API. Not run on hardware: docs/engines.md lists what was
checked and what was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from exporter.core.artifact import atomic_directory, need_space, publish, write_atomic
from exporter.core.digest import sha256_file
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError
from exporter.core.progress import Progress, silent
from exporter.engines.machine import this_machine
from exporter.engines.options import EngineOptions, apply_options
from exporter.engines.profiles import PartProfiles, add_profiles, read_profiles
from exporter.engines.record import (
    SCHEMA,
    Digests,
    EngineRecord,
    TimingCacheUse,
    graph_digests,
    this_system,
    write_record,
)
from exporter.engines.timing import TimingCache, cache_key
from exporter.runtimes.trt import PARTS, SUFFIX
from exporter.runtimes.trt_api import LastErrors, make_logger, version_of
from exporter.runtimes.trt_memory import DeviceFacts

LOG = "builder.log"


@dataclass(frozen=True)
class EngineReport:
    """What was built and where; `seconds` of everything."""

    folder: Path
    records: tuple[EngineRecord, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of all engines."""
        return sum(r.bytes for r in self.records)


def build_engines(
    model_dir: Path,
    export_record: Path,
    out: Path,
    options: EngineOptions | None = None,
    *,
    reuse: Path | None = None,
    progress: Progress = silent,
) -> EngineReport:
    """Build an engine of each graph in ``model_dir/onnx`` into the folder `out`, which must not exist.

    `export_record` is the export.json of these graphs. `out` gets the engines, a record beside each,
    the builder's log and the timing cache, which starts as that of the folder `reuse` where it has
    the right one. A build that fails leaves its log alone, beside `out`. Raises `EnvironmentLacks`
    without TensorRT or a GPU, `InputRefused` for graphs that TensorRT does not take.
    """
    profiles = read_profiles(export_record)
    with this_machine() as machine:
        asked = BuildRequest(
            machine.trt,
            machine.memory.facts,
            model_dir,
            profiles,
            options or EngineOptions(),
            reuse,
        )
        return build_on(asked, out, progress)


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built, with what, for which device."""

    trt: Any
    device: DeviceFacts
    model_dir: Path
    profiles: Mapping[str, PartProfiles]
    options: EngineOptions
    reuse: Path | None = None


def build_on(asked: BuildRequest, out: Path, progress: Progress = silent) -> EngineReport:
    """`build_engines` with library and device given."""
    start = perf_counter()
    graphs = {p: asked.model_dir / "onnx" / f"{p}.onnx" for p in PARTS}
    if lost := [str(g) for g in graphs.values() if not g.is_file()]:
        raise InputRefused(f"{lost[0]}: no such file; expected an exported graph")
    # An engine is about as large as its weights, and is in memory too when it is written.
    need_space(out.parent, sum(f.stat().st_size for f in graphs["embed_tokens"].parent.iterdir()))
    key = cache_key(asked.device, version_of(asked.trt), asked.options)
    log = BuilderLog()
    try:
        with atomic_directory(out) as work, log.writing(work / LOG):
            cache = TimingCache(work, key, asked.reuse)
            records = []
            for done, (part, graph) in enumerate(graphs.items()):
                progress(done, len(graphs), part)
                log.heading(part)
                records.append(_build_part(asked, part, graph, work, cache, log))
            progress(len(graphs), len(graphs))
    except MedexportError as error:
        kept = out.with_name(f"{out.name}.{LOG}")
        if log.keep(kept):
            raise type(error)(f"{error}; log in {kept}") from error
        raise
    return EngineReport(out, tuple(records), perf_counter() - start)


def _build_part(
    asked: BuildRequest, part: str, graph: Path, work: Path, cache: TimingCache, log: BuilderLog
) -> EngineRecord:
    trt, start = asked.trt, perf_counter()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse_graph(trt, logger, network, graph)
    config = builder.create_builder_config()
    apply_options(trt, config, asked.options)
    add_profiles(builder, config, network, asked.profiles[part])
    cache.attach(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EnvironmentLacks(
            f"TensorRT {version_of(trt)} builds no engine from {graph.name} on {asked.device.name}: "
            f"{log.errors.text()}"
        )
    cache.store(config)
    path = work / f"{part}{SUFFIX}"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(memoryview(plan))
    publish(partial, path)
    graph_sha, data_sha = graph_digests(graph)
    record = EngineRecord(
        schema=SCHEMA,
        part=part,
        device=asked.device,
        tensorrt=version_of(trt),
        system=this_system(),
        options=asked.options,
        profiles={n: dict(p) for n, p in asked.profiles[part].items()},
        types=tensor_types(network),
        seconds=round(perf_counter() - start, 3),
        bytes=path.stat().st_size,
        timing_cache=TimingCacheUse(key=cache.key, reused=cache.reused),
        digests=Digests(graph=graph_sha, data=data_sha, engine=sha256_file(path)),
    )
    write_record(work, record)
    return record


def parse_graph(trt: Any, logger: Any, network: Any, graph: Path) -> None:
    """Read a graph file into a network. Raises `InputRefused` with the parser's errors in one line.

    The parser gets the path, not the bytes: it finds external data beside the file.
    """
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    said = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = (
            f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
        )
        said.append(f"{where}{' '.join(error.desc().split())[:300]}")
    more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
    raise InputRefused(
        f"{graph}: TensorRT {version_of(trt)} does not parse it: {'; '.join(said[:3]) or 'no reason given'}"
        f"{more}"
    )


def tensor_types(network: Any) -> dict[str, int]:
    """How many outputs of the network's layers have each type: in a strongly typed network these
    are the types that the engine computes in.
    """
    layers = (network.get_layer(i) for i in range(network.num_layers))
    kinds = (x.get_output(i).dtype.name for x in layers for i in range(x.num_outputs))
    return dict(sorted(Counter(kinds).items()))


class BuilderLog:
    """Everything that the builder says, in a file; its last errors in `errors`."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._failed = ""
        self.errors = LastErrors()

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Write to `path` inside the block."""
        with path.open("w", encoding="utf-8") as file:
            self._file = file
            try:
                yield
            except BaseException:  # the folder is about to go: hold what it says
                file.flush()
                self._failed = path.read_text(encoding="utf-8")
                raise
            finally:
                self._file = None

    def __call__(self, severity: str, line: str) -> None:
        """Write one line."""
        self.errors(severity, line)
        if self._file is not None:
            self._file.write(f"{severity}: {line}\n")

    def heading(self, part: str) -> None:
        """Say which engine the next lines belong to."""
        if self._file is not None:
            self._file.write(f"== {part}\n")

    def keep(self, path: Path) -> bool:
        """Write what a failed build logged to `path`; False when nothing was logged."""
        if self._failed:
            write_atomic(path, self._failed.encode())
        return bool(self._failed)
