"""What a GPU says of a process, against a simulated board; with the `gpu` marker against a real one."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from exporter.compare.gpu import GpuMeter, GpuUse, board
from exporter.compare.gpu_report import gpu_method, gpu_note, gpu_table, held_on_gpu
from exporter.compare.jobs import CaseResult, Job, JobCase, JobResult
from exporter.compare.records import Length, Memory, Row
from exporter.compare.speed import gpu_figures, memory_figures
from exporter.compare.worker import answer
from exporter.runtimes.base import Caption, Timing

OWN = os.getpid()


class Board(ModuleType):
    """Stands for nvidia-ml-py with one GPU whose memory and energy the test sets.

    `refuses` are the calls that raise, as on a board without a counter or in a container.
    """

    class NVMLError(Exception):
        pass

    def __init__(self, *refuses: str) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.used, self.energy, self.held, self.opened = 1_000, 50_000, 300, 0
        self.asked: list[object] = []
        self._refuses = refuses

    def _refuse(self, call: str) -> None:
        assert self.opened == 1 or call == "init", f"{call} outside of init and shutdown"
        if call in self._refuses:
            raise self.NVMLError(f"{call}: Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802
        self._refuse("init")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index > 3:
            raise self.NVMLError("Invalid Argument")
        self.asked.append(index)
        return "board"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "board"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self._refuse("processes")
        return [SimpleNamespace(pid=OWN, usedGpuMemory=self.held)]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._refuse("memory")
        return SimpleNamespace(used=self.used, total=10**9)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self._refuse("energy")
        return self.energy

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return b"NVIDIA Test"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"


def install(monkeypatch: pytest.MonkeyPatch, library: Board) -> Board:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


class Cuda:
    """torch.cuda as far as the meter asks it."""

    def __init__(self, initialized: bool) -> None:
        self.initialized, self.waits = initialized, 0

    def is_initialized(self) -> bool:
        return self.initialized

    def synchronize(self) -> None:
        self.waits += 1

    def max_memory_allocated(self) -> int:
        return 700

    def max_memory_reserved(self) -> int:
        return 900


def use_torch(monkeypatch: pytest.MonkeyPatch, *, initialized: bool) -> Cuda:
    cuda = Cuda(initialized)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def test_memory_grows_from_before_loading_and_energy_from_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = install(monkeypatch, Board())
    cuda = use_torch(monkeypatch, initialized=True)
    times = iter([10.0, 20.0, 24.0])
    monkeypatch.setattr("exporter.compare.gpu.perf_counter", lambda: next(times))
    meter = GpuMeter()
    library.used, library.energy = 5_000, 60_000
    meter.begin()
    library.used, library.energy = 7_500, 61_200
    found = meter.finish(30)
    # 1200 mJ in 4 s for 30 tokens; 10 J before `begin` were loading and warm-up.
    assert found.joules == pytest.approx(1.2)
    assert found.watts == pytest.approx(0.3)
    assert found.joules_per_token == pytest.approx(0.04)
    assert (found.process, found.device) == (300, 6_500)
    assert (found.allocated, found.reserved) == (700, 900)
    assert cuda.waits == 2, "the clock is read when the device is done"
    assert library.opened == 0


def test_what_a_board_does_not_say_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch, initialized=False)
    install(monkeypatch, Board("energy", "processes"))
    meter = GpuMeter()
    meter.begin()
    assert meter.finish(5) == GpuUse(device=0)
    install(monkeypatch, Board("init"))
    meter = GpuMeter()
    meter.begin()
    assert meter.finish(5) == GpuUse()
    assert board().startswith("not known")
    install(monkeypatch, Board())
    meter = GpuMeter()
    meter.begin()
    assert meter.finish(0).joules_per_token is None
    assert board() == "NVIDIA Test, driver 580.1"


@pytest.mark.parametrize(
    ("visible", "asked"), [("2,3", 2), ("GPU-ab", "GPU-ab"), ("", None), ("7", None)]
)
def test_the_board_is_the_first_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, visible: str, asked: object
) -> None:
    library = install(monkeypatch, Board())
    use_torch(monkeypatch, initialized=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    GpuMeter()
    assert library.asked == ([] if asked is None else [asked])


def results(*uses: GpuUse | None) -> list[JobResult]:
    return [JobResult("", 1.0, 1, 2, 3, True, {}, [], gpu=u) for u in uses]


def test_a_models_figures_are_medians_of_its_processes() -> None:
    found = gpu_figures(
        results(GpuUse(process=10, watts=5.0), GpuUse(process=40), GpuUse(process=20, watts=7.0))
    )
    assert found == GpuUse(process=20, watts=6.0)
    assert gpu_figures(results(None, None)) is None
    assert memory_figures(results(GpuUse(device=8), None)).gpu == GpuUse(device=8)


class Model:
    """Captions without computing; drains the simulated board."""

    def __init__(self, library: Board) -> None:
        self._library = library

    def caption(self, image: object, prompt: str, max_new_tokens: int) -> Caption:
        self._library.energy += 500
        return Caption("a b", (1, 2), True, 4, Timing(0.1, 0.1, 0.1, (0.1, 0.1)))


def job(folder: Path, device: str) -> Job:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(folder / "a.png")
    case = JobCase("a", str(folder / "a.png"), "0" * 64)
    return Job(
        name="m", role="speed", runtime="ort", model_dir="m", model_sha256="0" * 64, threads=1,
        prompt="?", max_new_tokens=4, cases=(case, case), folder=str(folder), device=device,
    )  # fmt: skip


def test_a_worker_reports_its_gpu_and_the_cache_knows_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = install(monkeypatch, Board())
    use_torch(monkeypatch, initialized=False)
    asked = job(tmp_path, "cuda")
    result = answer(asked, Model(library), 1.0, GpuMeter())  # type: ignore[arg-type]
    assert result.gpu is not None
    # Two captions of 500 mJ (the warm-up's is before `begin`), three tokens each with the stop.
    assert result.gpu.joules == pytest.approx(1.0)
    assert result.gpu.joules_per_token == pytest.approx(1 / 6)
    assert msgspec.json.decode(msgspec.json.encode(result), type=JobResult) == result
    assert answer(job(tmp_path, "cpu"), Model(library), 1.0).gpu is None  # type: ignore[arg-type]
    assert asked.digest != job(tmp_path, "cpu").digest
    assert isinstance(result.cases[0], CaseResult)


def row(name: str, use: GpuUse | None) -> Row:
    memory = Memory(3, 10**6, None, None, True, use)
    return Row(
        name=name, role="candidate", runtime="ort", threads=1, model_sha256="", versions={}, parts={},
        bytes=0, ratio=1.0, length=Length(1, 1.0, 0), memory=memory,
    )  # fmt: skip


def test_figures_are_shown_with_how_they_were_measured() -> None:
    full = GpuUse(2 * 10**8, 3 * 10**8, 10**8, 15 * 10**7, 80.4, 12.0, 0.25)
    rows = [row("a", full), row("b", None), row("c", GpuUse(device=5 * 10**8))]
    shown = gpu_table(rows)
    for text in ("200", "300", "150", "80", "12.0", "0.25", "500"):
        assert f">{text}<" in shown
    assert shown.count("<tr") == 3, "a header and two rows: b has no GPU"
    assert gpu_note(rows[0]) == (
        "a on the GPU: 200 MB by NVML, torch's peak 100 MB, 150 reserved, 80 W, 0.25 J a token."
    )
    assert gpu_note(rows[1]) == ""
    assert held_on_gpu(rows[2]) == 5 * 10**8
    assert "hides" in gpu_method(rows)["gpu"]
    assert gpu_method(rows[1:2]) == {}
    assert gpu_table(rows[1:2]) == ""


@pytest.mark.gpu
def test_a_real_board_says_what_torch_allocated() -> None:
    import torch

    meter = GpuMeter()
    block = torch.ones(64 << 20, device="cuda")
    meter.begin()
    for _ in range(50):
        block.mul_(1.0001)
    found = meter.finish(10)
    assert found.allocated is not None
    assert found.allocated >= block.numel() * 4
    assert found.device is not None
    assert found.device >= block.numel() * 4
    assert found.joules is None or found.joules > 0
