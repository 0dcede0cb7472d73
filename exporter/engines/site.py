"""What a site does with engines: rebuild them and prove them, or use them with the graph to fall back on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.core.progress import Progress, silent
from exporter.engines.build import BuildRequest, EngineReport, build_on
from exporter.engines.golden import (
    FILE,
    Golden,
    SelfTest,
    require_passed,
    self_test,
    write_self_test,
)
from exporter.engines.machine import Machine, engine_folder, site_folder, this_machine
from exporter.engines.options import EngineOptions
from exporter.engines.preflight import load_engines, open_engines
from exporter.engines.profiles import read_profiles
from exporter.runtimes.base import Captioner
from exporter.runtimes.ort import OrtCaptioner

Runtime = Literal["tensorrt", "onnxruntime"]


@dataclass(frozen=True)
class Rebuilt:
    """Engines that passed their self-test, in their final folder."""

    report: EngineReport
    test: SelfTest


@dataclass(frozen=True)
class Opened:
    """A captioner; `fallback`: why it runs the ONNX graph although engines were asked for, else empty."""

    captioner: Captioner
    runtime: Runtime
    fallback: str


def rebuild(
    bundle: Path,
    export_record: Path,
    golden: Golden,
    *,
    out: Path | None = None,
    options: EngineOptions | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rebuilt:
    """Build engines for the graphs of a bundle on this machine, test them, and put them in place.

    By default in `site_folder`; engines that are there stay until the new ones have passed. Raises
    `ParityFailed` when captions differ: the new engines are deleted then; `EnvironmentLacks` without
    TensorRT or a GPU; `InputRefused` for graphs that TensorRT does not take.
    """
    model_dir, profiles = bundle / "model", read_profiles(export_record)
    with this_machine() as machine:
        final = out or site_folder(bundle, machine.memory.facts)
        fresh = final.with_name(f"{final.name}.new")
        _remove(fresh)
        request = BuildRequest(
            machine.trt,
            machine.memory.facts,
            model_dir,
            profiles,
            options or EngineOptions(),
            final,
        )
        try:
            report = build_on(request, fresh, progress)
            test = _prove(machine, model_dir, report, golden, threads, progress)
            _replace(final, fresh)
        except BaseException:
            _remove(fresh)
            raise
    return Rebuilt(EngineReport(final, report.records, report.seconds), test)


def prove_engines(
    model_dir: Path,
    report: EngineReport,
    golden: Golden,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> SelfTest:
    """The self-test of engines that `build_engines` has just built; its result lies beside them.

    Without it the preflight refuses them. Raises `ParityFailed` when captions differ: the folder is
    deleted then, and the result lies beside where it was.
    """
    with this_machine() as machine:
        try:
            return _prove(machine, model_dir, report, golden, threads, progress)
        except BaseException:
            _remove(report.folder)
            raise


@contextmanager
def open_captioner(
    bundle: Path,
    *,
    engines: Path | None = None,
    threads: int | None = None,
    announce: Callable[[str], None],
) -> Iterator[Opened]:
    """Engines of this machine where they pass the preflight, else the ONNX graph.

    `engines`: their folder, by default the site's or the bundle's own. That the graph is used, and
    why, goes to `announce` in one line and stands in the result.
    """
    with ExitStack() as stack:
        try:
            opened = _open_engines(stack, bundle, engines)
        except (EnvironmentLacks, InputRefused) as error:
            stack.close()
            announce(f"not TensorRT but the ONNX graph with onnxruntime on the CPU: {error}")
            opened = Opened(
                OrtCaptioner(bundle / "model", threads=threads), "onnxruntime", str(error)
            )
        yield opened


def _open_engines(stack: ExitStack, bundle: Path, engines: Path | None) -> Opened:
    machine = stack.enter_context(this_machine())
    folder = engines or engine_folder(bundle, machine.memory.facts)
    captioner = open_engines(bundle / "model", folder, machine.trt, machine.memory)
    stack.callback(captioner.close)
    return Opened(captioner, "tensorrt", "")


def _prove(
    machine: Machine,
    model_dir: Path,
    report: EngineReport,
    golden: Golden,
    threads: int | None,
    progress: Progress,
) -> SelfTest:
    captioner = load_engines(model_dir, report.folder, machine.trt, machine.memory, report.records)
    try:
        found = self_test(
            captioner,
            lambda: OrtCaptioner(model_dir, threads=threads),
            golden,
            report.records,
            progress=progress,
        )
    finally:
        captioner.close()
    found = msgspec.structs.replace(found, step_graph=captioner.engine.decoder.step_graph)
    if not found.passed:  # outlives the folder
        write_self_test(found, report.folder.with_name(f"{report.folder.name}.{FILE}"))
    require_passed(found)
    write_self_test(found, report.folder / FILE)
    return found


def _replace(final: Path, fresh: Path) -> None:
    """Put the folder `fresh` in the place of `final`."""
    old = final.with_name(f"{final.name}.old")
    _remove(old)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
