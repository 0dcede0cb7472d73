"""Finding TensorRT: there, missing, broken, too old; its log lines."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from exporter.core.errors import EnvironmentLacks
from exporter.pipeline.doctor import examine
from exporter.runtimes.trt_api import (
    LastErrors,
    available,
    load_tensorrt,
    make_logger,
    parse_version,
)
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.fake_tensorrt_types import Severity
from tests.support.host_memory import HostMemory


def test_versions_compare_as_numbers() -> None:
    assert parse_version("10.16.1.11") > parse_version("10.9.0.34") > parse_version("10.3.0")
    assert parse_version("10.14.1.48.post1") == (10, 14, 1, 48)
    with pytest.raises(ValueError, match="no version"):
        parse_version("unknown")


@pytest.mark.parametrize("version", ["8.6.1.post1", "10.2.0", "12.0.0"])
def test_a_version_that_the_code_was_not_written_for_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(HostMemory(), version))
    with pytest.raises(EnvironmentLacks, match=f"TensorRT {version}; expected 10.3 to 11.x"):
        load_tensorrt()


def test_a_missing_package_names_both_packages_and_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLacks) as caught:
        load_tensorrt()
    for word in ("tensorrt-cu12", "tensorrt-cu13", "https://pypi.nvidia.com", "JetPack"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 5


def test_bindings_without_their_library_are_no_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "tensorrt":
                raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(EnvironmentLacks, match="does not load .libnvinfer.so.10"):
        load_tensorrt()


def test_doctor_says_what_there_is_and_that_nothing_was_run_on_hardware(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporter.pipeline.doctor.available", lambda: "10.16.1.11")
    said = examine()["machine"]["TensorRT"]
    assert said == "10.16.1.11; engines: not run on hardware so far"

    def broken() -> str | None:
        raise EnvironmentLacks("TensorRT does not load")

    monkeypatch.setattr("exporter.pipeline.doctor.available", broken)
    assert examine()["machine"]["TensorRT"].startswith("TensorRT does not load; engines:")


def test_available_is_none_or_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available() is None
    fake = FakeTensorRT(HostMemory(), "11.4.0.106")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    assert available() == "11.4.0.106"


def test_the_last_errors_make_one_line() -> None:
    errors = LastErrors(keep=2)
    logger = make_logger(FakeTensorRT(HostMemory()), errors)
    assert errors.text() == "TensorRT logged no error"
    for severity, line in (
        (Severity.ERROR, "first"),
        (Severity.WARNING, "a warning"),
        (Severity.INTERNAL_ERROR, "second\nline"),
        (Severity.ERROR, "third"),
    ):
        logger.log(severity, line)
    assert errors.text() == "second line; third"
