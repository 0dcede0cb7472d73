import os
import resource
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from exporter.compare.memory import gpu_memory, peak_rss, reset_peak, unique_bytes


def test_peak_is_what_the_kernel_reports_otherwise() -> None:
    peak = peak_rss()
    assert peak is not None
    # ru_maxrss is never reset and both are counted in batches per thread: a few MB apart.
    assert peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 32e6
    assert peak > 10e6


def test_peak_and_unique_see_an_allocation() -> None:
    reset_peak()
    before, unique = peak_rss(), unique_bytes()
    block = np.ones(8_000_000)
    after, more = peak_rss(), unique_bytes()
    assert before is not None
    assert after is not None
    assert unique is not None
    assert more is not None
    assert after - before > 50e6
    assert more - unique > 50e6
    del block
    if reset_peak():
        lower = peak_rss()
        assert lower is not None
        assert lower < after - 50e6


def test_a_system_without_proc_says_nothing(tmp_path: Path) -> None:
    assert peak_rss(tmp_path) is None
    assert unique_bytes(tmp_path) is None
    assert not reset_peak(tmp_path / "missing")


class SimulatedNvml(ModuleType):
    """Stands for nvidia-ml-py: `gpus` are the (process number, bytes) that each GPU lists.

    `broken` is the call that raises, as without a driver (init) or permission (processes).
    """

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: Sequence[Sequence[tuple[int, int | None]]], broken: str = "") -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.opened = 0
        self._gpus, self._broken = gpus, broken

    def nvmlInit(self) -> None:  # noqa: N802
        if self._broken == "init":
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetComputeRunningProcesses(  # noqa: N802
        self, handle: int
    ) -> list[SimpleNamespace]:
        if self._broken == "processes":
            raise self.NVMLError("Insufficient Permissions")
        return [SimpleNamespace(pid=p, usedGpuMemory=held) for p, held in self._gpus[handle]]


OWN, OTHER = os.getpid(), os.getpid() + 1


@pytest.mark.parametrize(
    ("gpus", "broken", "expected"),
    [
        ([[(OTHER, 7), (OWN, 300)], [(OWN, 50)]], "", 350),
        ([[(OTHER, 7)]], "", None),
        ([[(OWN, None)]], "", None),
        ([], "", None),
        ([[(OWN, 300)]], "init", None),
        ([[(OWN, 300)]], "processes", None),
    ],
    ids=["two GPUs", "another process", "amount hidden", "no GPU", "no driver", "forbidden"],
)
def test_gpu_memory_is_this_processs_over_all_gpus(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[list[tuple[int, int | None]]],
    broken: str,
    expected: int | None,
) -> None:
    library = SimulatedNvml(gpus, broken)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert gpu_memory() == expected
    assert library.opened == 0, "what was opened is closed"


def test_gpu_memory_is_unknown_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr("exporter.compare.memory.find_spec", lambda name: None)
    assert gpu_memory() is None
