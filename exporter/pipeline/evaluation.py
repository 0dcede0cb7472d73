"""On which cases models are asked and compared; imports nothing of the build side."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.calibrate.sets import ImageSet, open_set
from exporter.catalog.schema import Gate
from exporter.core.cases import Case, prompt_for
from exporter.core.progress import Progress, silent
from exporter.runtimes.threads import usable_cores

if TYPE_CHECKING:
    from exporter.compare.candidates import Candidate
    from exporter.compare.compare import Comparison

REFERENCE = "fp16"
# What captioners are compared on where nothing is given.
IMAGES = "phantoms-eval"


@dataclass(frozen=True)
class Evaluation:
    """The cases that models are run on, and how; `robustness` of them are also perturbed."""

    images: ImageSet
    cases: tuple[Case, ...]
    prompt: str
    max_new_tokens: int
    threads: int
    gate: Gate
    smoke: bool
    robustness: int = 0

    @property
    def set_name(self) -> str:
        """The image set's name."""
        return self.images.name

    @property
    def set_digest(self) -> str:
        """SHA-256 over the image set's content."""
        return self.images.digest


def open_evaluation(
    name: str,
    *,
    limit: int = 0,
    prompt: str | None = None,
    max_new_tokens: int = 64,
    threads: int | None = None,
    gate: Gate | None = None,
    robustness: int = 0,
) -> Evaluation:
    """An image set by name or folder, its hashes checked, with `limit` of its cases (0: all).

    A limited run sees every modality and is a smoke test. Without `gate` the usual margins hold.
    `robustness` cases are also captioned under small perturbations when models are compared. Raises
    `InputRefused` where the prompt names a modality that a case does not have.
    """
    images = open_set(name)
    cases = spread(images.cases(), limit)
    # An empty prompt is one: models trained without an instruction want it.
    asked = images.prompt if prompt is None else prompt
    for case in cases:
        prompt_for(asked, case.modality)  # before anything is built
    return Evaluation(
        images=images,
        cases=cases,
        prompt=asked,
        max_new_tokens=max_new_tokens,
        threads=threads or usable_cores(),
        gate=gate or Gate(),
        smoke=limit > 0,
        robustness=robustness,
    )


def spread(cases: Sequence[Case], limit: int) -> tuple[Case, ...]:
    """`limit` cases, as many of each modality as can be, at equal distances (0: all, in order)."""
    if not limit or limit >= len(cases):
        return tuple(cases)
    queues: dict[str, list[Case]] = {}
    for case in cases:
        queues.setdefault(case.modality, []).append(case)
    share = -(-limit // len(queues))
    counts = {modality: min(share, len(q)) for modality, q in queues.items()}
    picked = [
        [q[i * len(q) // n] for i in range(n)]
        for q, n in zip(queues.values(), counts.values(), strict=True)
    ]
    turns = [queue[i] for i in range(share) for queue in picked if i < len(queue)]
    return tuple(turns[:limit])


def compare_exported(
    reference: Path,
    candidates: Mapping[str, Path],
    out: Path,
    evaluation: Evaluation,
    *,
    lineage: Mapping[str, Any],
    scratch: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare exported folders with the reference; writes compare.json, cases.jsonl, report.html.

    Finished processes are kept in `scratch` (by default inside `out`) until all are done, so that a
    killed comparison goes on where it was.
    """
    from exporter.compare.compare import Candidate

    rows = [Candidate(REFERENCE, reference / "model", "ort")]
    rows += [Candidate(name, exported / "model", "ort") for name, exported in candidates.items()]
    return compare_candidates(
        rows, out, evaluation, lineage=lineage, scratch=scratch, progress=progress
    )


def compare_candidates(
    rows: Sequence[Candidate],
    out: Path,
    evaluation: Evaluation,
    *,
    lineage: Mapping[str, Any],
    scratch: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare with the first of `rows`; what is written and kept is as for `compare_exported`."""
    from exporter.compare.compare import Plan, compare_models, write_reports
    from exporter.compare.tradeoff import read_tradeoff

    work = scratch or out / "work"
    work.mkdir(parents=True, exist_ok=True)
    comparison = compare_models(
        rows,
        evaluation.cases,
        evaluation.prompt,
        evaluation.max_new_tokens,
        work,
        threads=evaluation.threads,
        progress=progress,
        plan=Plan(gate=evaluation.gate, smoke=evaluation.smoke, perturbed=evaluation.robustness),
    )
    curves = {row.name: read_tradeoff(row.model_dir.parent) for row in rows[1:]}
    write_reports(comparison, out, lineage, {n: c for n, c in curves.items() if c})
    shutil.rmtree(work)
    return comparison
