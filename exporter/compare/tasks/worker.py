"""The measured process of a task: ``python -m exporter.compare.tasks.worker request.json``.

One model, one process: its memory is its own, and nothing of another candidate is warm.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from exporter.compare.memory import peak_rss, reset_peak, unique_bytes
from exporter.compare.process import RESULT, serve
from exporter.compare.tasks.answers import ANSWERS, Answered
from exporter.compare.tasks.jobs import ARRAYS, TaskJob, TaskJobCase, TaskResult
from exporter.core.artifact import write_atomic
from exporter.runtimes.graphs import Graphs, OrtGraphs


def main(arguments: Sequence[str]) -> int:
    """Run the request in the file named by the one argument; returns the exit code."""
    return serve(arguments, TaskJob, run)


def run(job: TaskJob) -> None:
    """Load, ask and measure; write the arrays, then `folder`/result.json, each in one rename."""
    start = perf_counter()
    graphs = OrtGraphs(Path(job.model_dir), threads=job.threads)
    answer(job, graphs, start)


def answer(job: TaskJob, graphs: Graphs, start: float) -> TaskResult:
    """Warm up on the first case, then answer all of them with a loaded model."""
    first = msgspec.structs.replace(
        job, role="speed", cases=job.cases[:1], labels=job.labels[:1], texts=job.texts[:1]
    )
    ANSWERS[job.task](first, graphs, None)
    loaded = perf_counter() - start
    peak_load, reset = peak_rss(), reset_peak()
    found: Answered = ANSWERS[job.task](job, graphs, _report)
    result = TaskResult(
        job=job.digest,
        load_seconds=loaded,
        peak_load=peak_load,
        peak_run=peak_rss(),
        unique=unique_bytes(),
        peak_was_reset=reset,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("onnxruntime", "numpy")},
        seconds=found.seconds,
        scale=found.scale,
        bias=found.bias,
        head=found.head,
        head_labels=found.head_labels,
        entities=found.entities,
        written=found.written,
    )
    folder = Path(job.folder)
    partial = folder / f"partial-{ARRAYS}"
    np.savez(partial, **found.arrays)  # type: ignore[arg-type]  # its stub takes names for options
    partial.replace(folder / ARRAYS)
    write_atomic(folder / RESULT, msgspec.json.encode(result))
    return result


def _report(case: TaskJobCase) -> None:
    sys.stdout.write(f"{case.id}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
