"""The measured process: ``python -m exporter.compare.worker request.json``.

One model, one process: its memory is its own, and nothing of another candidate is warm.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.compare.blank import Probed, probe_case, probed_ids, spread_ids
from exporter.compare.gpu import GpuMeter
from exporter.compare.jobs import (
    CaseResult,
    Job,
    JobCase,
    JobResult,
    Probe,
    Scores,
    compare_kept,
    read_result,
)
from exporter.compare.memory import peak_rss, reset_peak, unique_bytes
from exporter.compare.perturb import perturbed_captions
from exporter.compare.process import RESULT, serve
from exporter.core.artifact import need_space, write_atomic
from exporter.core.errors import InputRefused
from exporter.runtimes.base import Caption
from exporter.runtimes.images import open_image
from exporter.runtimes.providers import Device

LIBRARIES = {"ort": ("onnxruntime", "numpy"), "torch": ("torch", "transformers", "numpy")}


def main(arguments: Sequence[str]) -> int:
    """Run the request in the file named by the one argument; returns the exit code."""
    return serve(arguments, Job, run)


def run(job: Job) -> None:
    """Load, ask and measure, and write `folder`/result.json in one rename."""
    meter = GpuMeter() if job.device == "cuda" else None
    start = perf_counter()
    captioner = open_captioner(
        job.runtime, Path(job.model_dir), job.threads, device=job.device, dtype=job.dtype
    )
    result = answer(job, captioner, perf_counter() - start, meter)
    write_atomic(Path(job.folder) / RESULT, msgspec.json.encode(result))


def answer(
    job: Job, captioner: Probed, load_seconds: float, meter: GpuMeter | None = None
) -> JobResult:
    """Warm up, then caption, score and probe every case with a loaded model."""
    _caption(captioner, job, job.cases[0])
    peak_load, reset = peak_rss(), reset_peak()
    spill = _Spill(Path(job.folder) / "logits", job.logits_bytes)
    tokens, probed = _reference_tokens(job), probed_ids(job)
    perturbed = spread_ids(job, job.perturbed)
    cases: list[CaseResult] = []
    if meter:
        meter.begin()
    for case in job.cases:
        caption = _caption(captioner, job, case)
        scores = probe = None
        if job.role == "reference":
            spill.keep(len(cases), _score(captioner, job, case, caption.tokens))
        elif job.role == "candidate":
            scores = _compare(captioner, job, case, tokens[case.id], len(cases))
        if case.id in probed:
            probe = probe_case(captioner, job, case, caption, tokens.get(case.id))
        moved = perturbed_captions(captioner, job, case) if case.id in perturbed else {}
        cases.append(_result(case, caption, scores, probe, moved))
        sys.stdout.write(f"{case.id}\n")
        sys.stdout.flush()
    return JobResult(
        job=job.digest,
        load_seconds=load_seconds,
        peak_load=peak_load,
        peak_run=peak_rss(),
        unique=unique_bytes(),
        peak_was_reset=reset,
        versions=_versions(job.runtime, job.device),
        cases=cases,
        gpu=meter.finish(sum(len(c.decode) + 1 for c in cases)) if meter else None,
    )


def open_captioner(
    runtime: str, model_dir: Path, threads: int, *, device: str = "cpu", dtype: str = "float32"
) -> Probed:
    """The runtime of that name with the model loaded; `dtype` is the float type of "torch".

    Raises `InputRefused` for another name, `EnvironmentLacks` without the device.
    """
    if runtime == "ort":
        from exporter.runtimes.ort import OrtCaptioner

        return OrtCaptioner(model_dir, threads=threads, device=cast(Device, device))
    if runtime == "torch":
        from exporter.runtimes.torch_device import Place
        from exporter.runtimes.torch_reference import TorchCaptioner

        place = Place(cast(Device, device), dtype)
        return TorchCaptioner(model_dir, threads=threads, place=place)
    raise InputRefused(f"runtime '{runtime}' is unknown; expected ort or torch")


class _Spill:
    """Keeps the reference's logits on disk, one .npy per case, until the budget is used."""

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder, self._left = folder, budget

    def keep(self, index: int, logits: NDArray[np.float32]) -> None:
        if logits.nbytes > self._left:
            # From here on nothing is kept, so that what is scored does not depend on caption length.
            self._left = 0
            return
        self._left -= logits.nbytes
        self._folder.mkdir(parents=True, exist_ok=True)
        need_space(self._folder, logits.nbytes)
        np.save(_logits_path(self._folder.parent, index), logits)


def _logits_path(folder: Path, index: int) -> Path:
    return folder / "logits" / f"{index:06d}.npy"


def _reference_tokens(job: Job) -> dict[str, list[int]]:
    if job.role != "candidate":
        return {}
    result = read_result(Path(job.reference or "") / RESULT)
    if result is None or [c.id for c in result.cases] != [c.id for c in job.cases]:
        raise InputRefused(
            f"{job.reference}: not the reference's result for these cases; remove the work folder"
        )
    return {c.id: c.tokens for c in result.cases}


def _caption(captioner: Probed, job: Job, case: JobCase) -> Caption:
    return captioner.caption(open_image(Path(case.image)), job.asked(case), job.max_new_tokens)


def _score(
    captioner: Probed, job: Job, case: JobCase, tokens: Sequence[int]
) -> NDArray[np.float32]:
    return captioner.score(open_image(Path(case.image)), job.asked(case), tokens)


def _compare(
    captioner: Probed, job: Job, case: JobCase, tokens: Sequence[int], index: int
) -> Scores | None:
    path = _logits_path(Path(job.reference or ""), index)
    if not path.is_file():
        return None
    own = _score(captioner, job, case, tokens)
    return compare_kept(path, own, tokens, f"'{job.name}' on {case.id}")


def _result(
    case: JobCase,
    caption: Caption,
    scores: Scores | None,
    probe: Probe | None,
    perturbed: dict[str, str],
) -> CaseResult:
    timing = caption.timing
    return CaseResult(
        id=case.id,
        text=caption.text,
        tokens=list(caption.tokens),
        stopped=caption.stopped,
        prompt_tokens=caption.prompt_tokens,
        prepare=timing.prepare,
        vision=timing.vision,
        prefill=timing.prefill,
        decode=list(timing.decode),
        scores=scores,
        probe=probe,
        perturbed=perturbed,
    )


def _versions(runtime: str, device: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    names = LIBRARIES[runtime]
    if (runtime, device) == ("ort", "cuda"):
        names = ("onnxruntime-gpu", *names[1:])
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
