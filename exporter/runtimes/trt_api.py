"""The TensorRT library: whether it is there, which version, and where it comes from.

Not run on hardware: docs/engines.md lists what was checked and what was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from exporter.core.errors import EnvironmentLacks

# The names that are called exist in the published bindings of 10.3, 10.16 and 11.4.
OLDEST, NEWEST_MAJOR = (10, 3), 11
SOURCES = (
    "pip install tensorrt-cu12 (driver for CUDA 12) or tensorrt-cu13 (CUDA 13) with "
    "--extra-index-url https://pypi.nvidia.com; on a Jetson it is part of JetPack "
    "(apt install python3-libnvinfer), in a virtual environment with system site packages"
)
LogSink = Callable[[str, str], None]


def load_tensorrt() -> ModuleType:
    """The module ``tensorrt``.

    Raises `EnvironmentLacks` when it is missing, does not load, or is of a version that the code
    was not written for.
    """
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise EnvironmentLacks(f"TensorRT does not load ({error}): {SOURCES}") from error
        raise EnvironmentLacks(
            f"the Python package 'tensorrt' is not installed: {SOURCES}"
        ) from error
    except ImportError as error:  # the bindings without libnvinfer
        raise EnvironmentLacks(f"TensorRT does not load ({error}): {SOURCES}") from error
    found: ModuleType = tensorrt
    version = version_of(found)
    numbers = parse_version(version)
    if numbers < OLDEST or numbers[0] > NEWEST_MAJOR:
        raise EnvironmentLacks(
            f"TensorRT {version}; expected {OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR}.x: {SOURCES}"
        )
    return found


def available() -> str | None:
    """TensorRT's version, None where the package is not installed.

    Raises `EnvironmentLacks` when it is installed but cannot be used.
    """
    from importlib.util import find_spec

    return version_of(load_tensorrt()) if find_spec("tensorrt") else None


def version_of(trt: Any) -> str:
    """The version of a loaded module."""
    return str(trt.__version__)


def parse_version(text: str) -> tuple[int, ...]:
    """``10.16.1.11`` as numbers, to compare. Raises ValueError for anything else."""
    found = re.match(r"\d+(\.\d+)+", text)
    if found is None:
        raise ValueError(f"'{text}' is no version")
    return tuple(int(part) for part in found.group().split("."))


def make_logger(trt: Any, sink: LogSink) -> Any:
    """A logger of TensorRT that gives `sink` the severity's name and the line.

    The class is made here, as its base class is only there with the library.
    """

    class SinkLogger(trt.ILogger):  # type: ignore[misc]  # Any without the library
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            sink(str(severity.name), msg)

    return SinkLogger()


class LastErrors:
    """Keeps the last errors that TensorRT logged, for a message of one line."""

    def __init__(self, keep: int = 3) -> None:
        self._keep = keep
        self._lines: list[str] = []

    def __call__(self, severity: str, line: str) -> None:
        """Take note of a log line."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._lines = [*self._lines, " ".join(line.split())[:300]][-self._keep :]

    def text(self) -> str:
        """The errors so far."""
        return "; ".join(self._lines) or "TensorRT logged no error"
