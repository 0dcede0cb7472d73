"""The calls we make against the published API: the stand-in, and the library where it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import fake_tensorrt_build, fake_tensorrt_run
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.host_memory import HostMemory
from tests.support.tensorrt_api import ENUMS, FUNCTIONS, METHODS, PROPERTIES

ROOT = Path(__file__).resolve().parents[3] / "exporter"
# What tests read of the stand-ins: no part of the library.
OWN = {"ILogger": {"said", "trt", "Severity"}, "INetworkDefinition": {"fill"}}


def stand_in(name: str) -> Any:
    rooms = (fake_tensorrt_build, fake_tensorrt_run)
    return next(getattr(room, name) for room in rooms if hasattr(room, name))


def members(name: str) -> set[str]:
    kind = stand_in(name)
    slots = set(getattr(kind, "__slots__", ()))
    found = {n for n in vars(kind) if not n.startswith("_")} - slots | {
        n for n in slots if f"{name}.{n}" in PROPERTIES
    }
    return found - OWN.get(name, set()) - {"trt"}


def test_the_stand_in_has_exactly_the_calls_of_the_table() -> None:
    for name in sorted({key.split(".")[0] for key in (*METHODS, *PROPERTIES)}):
        table = {k.split(".")[1] for k in (*METHODS, *PROPERTIES) if k.startswith(f"{name}.")}
        assert members(name) == table - {"__init__"}, name


@pytest.mark.parametrize("name", METHODS)
def test_the_stand_in_takes_the_arguments_of_the_table(name: str) -> None:
    kind, method = name.split(".")
    found = inspect.signature(getattr(stand_in(kind), method)).parameters
    arguments = tuple(found)[1:]
    assert arguments == METHODS[name]


def test_enums_of_the_stand_in_are_those_of_the_table() -> None:
    module = FakeTensorRT(HostMemory())
    for name, values in ENUMS.items():
        assert set(values) <= set(getattr(module, name).__members__), name


def test_every_row_of_the_table_is_called_somewhere() -> None:
    files = [*(ROOT / "engines").glob("*.py"), *(ROOT / "runtimes").glob("trt*.py")]
    code = "\n".join(f.read_text(encoding="utf-8") for f in files)
    members = {k.split(".")[1] for k in (*METHODS, *PROPERTIES)} - {"__init__"}
    kinds = {k.split(".")[0] for k in METHODS if k.endswith(".__init__")}
    values = {v for row in ENUMS.values() for v in row}
    for name in members | kinds | set(ENUMS) | set(FUNCTIONS):
        assert re.search(rf"\.{name}\b", code), name
    for name in values:
        assert re.search(rf"\b{name}\b", code), name


@pytest.mark.tensorrt
def test_the_library_has_every_call_with_these_arguments() -> None:
    import tensorrt

    for name, arguments in METHODS.items():
        kind, method = name.split(".")
        assert arguments in signatures(getattr(tensorrt, kind), method), name
    for name, use in PROPERTIES.items():
        kind, member = name.split(".")
        found = getattr(getattr(tensorrt, kind), member)
        assert isinstance(found, property), name
        assert use == "r" or found.fset is not None, name
    for name, values in ENUMS.items():
        assert set(values) <= set(getattr(tensorrt, name).__members__), name
    for name in FUNCTIONS:
        assert callable(getattr(tensorrt, name))


def signatures(kind: Any, method: str) -> set[tuple[str, ...]]:
    """Names of the arguments of each overload, out of the docstring that pybind11 writes; with and
    without arguments that have a default.
    """
    lines = (getattr(kind, method).__doc__ or "").splitlines()
    found = set()
    for line in lines:
        match = re.match(rf"(?:\d+\. )?{re.escape(method)}\((self: .*?)\) -> ", line)
        if match:
            given = [p.group(1) for p in re.finditer(r"(?:^|, )(\w+): ", match.group(1))]
            found.add(tuple(given[1:]))
    return found


@pytest.mark.tensorrt
def test_the_library_takes_our_logger_and_names_numpy_types() -> None:
    import numpy as np
    import tensorrt

    from exporter.runtimes.trt_api import make_logger, parse_version, version_of

    said: list[tuple[str, str]] = []
    logger = make_logger(tensorrt, lambda severity, line: said.append((severity, line)))
    assert isinstance(logger, tensorrt.ILogger)
    logger.log(tensorrt.ILogger.Severity.ERROR, "broken")
    assert said == [("ERROR", "broken")]
    assert parse_version(version_of(tensorrt)) >= (10, 3)
    assert np.dtype(tensorrt.nptype(tensorrt.DataType.HALF)) == np.float16
    with pytest.raises(TypeError):
        tensorrt.nptype(tensorrt.DataType.INT4)
