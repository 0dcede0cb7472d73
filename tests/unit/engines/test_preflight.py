"""Start-up: every reason for which engines must not be used, each in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.core.errors import InputRefused
from exporter.engines.golden import FILE, GoldenResult, SelfTest, write_self_test
from exporter.engines.options import EngineOptions
from exporter.engines.preflight import open_engines, preflight
from exporter.runtimes.trt import PARTS
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.host_memory import FACTS, HostMemory
from tests.support.tensorrt_site import build_there

VISION, DECODER = PARTS[0], PARTS[2]


def passed(folder: Path, gap: float | None = None, differs: int | None = None) -> None:
    """A self-test of the engines in `folder` as if it had been done."""
    engines = {
        p: json.loads((folder / f"{p}.json").read_text())["digests"]["engine"] for p in PARTS
    }
    case = GoldenResult("a", "onnx", 5, differs, gap)
    write_self_test(SelfTest(engines, "Describe.", 8, (case,)), folder / FILE)


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "engines"
    build_there(FakeTensorRT(HostMemory()), exported, folder)
    passed(folder)
    return folder


@pytest.fixture
def engines(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engines"))


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported / "model", tmp_path / "model"))


def test_engines_of_this_machine_open(model: Path, engines: Path) -> None:
    memory = HostMemory()
    trt = FakeTensorRT(memory)
    assert [r.part for r in preflight(model, engines, trt, FACTS)] == list(PARTS)
    captioner = open_engines(model, engines, trt, memory)
    captioner.close()
    assert memory.blocks == {}


def edit(folder: Path, part: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / f"{part}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def put(*keys: str, value: Any) -> Callable[[Path, Path], None]:
    def change(model: Path, engines: Path) -> None:
        def set_value(record: dict[str, Any]) -> None:
            for key in keys[:-1]:
                record = record[key]
            record[keys[-1]] = value

        edit(engines, DECODER, set_value)

    return change


def append_to(part: str, suffix: str) -> Callable[[Path, Path], None]:
    def change(model: Path, engines: Path) -> None:
        folder = model / "onnx" if suffix.startswith(".onnx") else engines
        with (folder / f"{part}{suffix}").open("ab") as file:
            file.write(b"x")

    return change


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda model, engines: (engines / name).unlink()


def remove_graph(model: Path, engines: Path) -> None:
    (model / "onnx" / f"{VISION}.onnx").unlink()


def remove_all(model: Path, engines: Path) -> None:
    shutil.rmtree(engines)


def not_json(model: Path, engines: Path) -> None:
    (engines / f"{VISION}.json").write_text("{")


def too_large(model: Path, engines: Path) -> None:
    (engines / f"{VISION}.json").write_bytes(b" " * (5 << 20))


def other_test(model: Path, engines: Path) -> None:
    found = json.loads((engines / FILE).read_text())
    found["engines"][VISION] = "0" * 64
    (engines / FILE).write_text(json.dumps(found))


def failed_test(model: Path, engines: Path) -> None:
    passed(engines, 0.5, 3)


def empty_test(model: Path, engines: Path) -> None:
    found = json.loads((engines / FILE).read_text())
    (engines / FILE).write_text(json.dumps({**found, "cases": []}))


def broken_test(model: Path, engines: Path) -> None:
    (engines / FILE).write_text("[]")


REASONS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no folder": (remove_all, "no engines for NVIDIA Test 1000 here"),
    "no record": (remove(f"{DECODER}.json"), "no engine record"),
    "no JSON": (not_json, "not an engine record"),
    "unknown key": (put("colour", value=1), "not an engine record"),
    "too large": (too_large, "expected at most"),
    "schema": (put("schema", value=2), "schema 2"),
    "part": (put("part", value="embed_tokens"), "of 'embed_tokens'"),
    "device": (put("device", "name", value="NVIDIA L4"), "is for NVIDIA L4"),
    "capability": (put("device", "compute_capability", value="9.0"), r"\(9.0\), this is"),
    "system": (put("system", value="Windows AMD64"), "is for Windows AMD64"),
    "version": (put("tensorrt", value="10.15.1"), "TensorRT 10.15.1, this is 10.16.1.11"),
    "newer version": (put("tensorrt", value="11.4.0.106"), "TensorRT 11.4.0.106, this is"),
    "graph gone": (remove_graph, "is of a graph that is not here"),
    "other graph": (append_to(VISION, ".onnx"), "is of another graph"),
    "other weights": (append_to(DECODER, ".onnx_data"), "is of other weights"),
    "engine gone": (remove(f"{DECODER}.engine"), "is missing"),
    "engine changed": (append_to(DECODER, ".engine"), "was changed after it was built"),
    "no self-test": (remove(FILE), "never tested"),
    "test of others": (other_test, "self-test was of other engines"),
    "failed test": (failed_test, "did not pass"),
    "empty test": (empty_test, "did not pass"),
    "broken test": (broken_test, "not a self-test"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_is_one_line_that_says_what_to_do(
    reason: str, model: Path, engines: Path
) -> None:
    change, says = REASONS[reason]
    change(model, engines)
    with pytest.raises(InputRefused, match=says) as caught:
        preflight(model, engines, FakeTensorRT(HostMemory()), FACTS)
    line = str(caught.value)
    assert "run `medexport engine build BUNDLE`" in line and "\n" not in line


def test_an_engine_that_does_not_load_is_refused(model: Path, engines: Path) -> None:
    # A file whose digest was brought up to date: only trying to load it tells.
    path = engines / f"{VISION}.engine"
    path.write_bytes(b"no engine")
    from exporter.core.digest import sha256_file

    edit(engines, VISION, lambda r: r["digests"].update(engine=sha256_file(path)))
    passed(engines)
    memory = HostMemory()
    with pytest.raises(InputRefused, match="does not load it .*magicTag failed.*engine build"):
        open_engines(model, engines, FakeTensorRT(memory), memory)


def test_version_compatible_engines_run_on_later_versions_only(
    exported: Path, tmp_path: Path
) -> None:
    options = EngineOptions(version_compatible=True)
    build_there(FakeTensorRT(HostMemory()), exported, tmp_path / "e", options)
    passed(tmp_path / "e")
    memory = HostMemory()
    later = FakeTensorRT(memory, "11.4.0.106")
    open_engines(exported / "model", tmp_path / "e", later, memory).close()
    assert later.seen.host_code is True
    older = FakeTensorRT(memory, "10.9.0.34")
    with pytest.raises(InputRefused, match="TensorRT 10.16.1.11 or later, this is 10.9.0.34"):
        preflight(exported / "model", tmp_path / "e", older, FACTS)


def test_engines_that_bring_no_code_do_not_get_leave_to_run_any(model: Path, engines: Path) -> None:
    memory = HostMemory()
    trt = FakeTensorRT(memory)
    open_engines(model, engines, trt, memory).close()
    assert trt.seen.host_code is None
