"""`compare_models`: the reference, its noise floor and every candidate, each in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter.compare import assemble
from exporter.compare.candidates import NOISE_FLOOR, Candidate, check_candidates, part_bytes
from exporter.compare.caption_figures import CaptionFigures, judged_figures
from exporter.compare.gate import judge_candidate
from exporter.compare.gpu_report import gpu_method
from exporter.compare.jobs import JobCase, JobResult
from exporter.compare.machine import machine
from exporter.compare.passes import (
    Plan,
    Setting,
    Steps,
    noise_floor_threads,
    quality_pass,
    speed_pass,
)
from exporter.compare.power import size_line
from exporter.compare.records import SCHEMA, Comparison, Row
from exporter.compare.report import render_report
from exporter.compare.robustness import robustness_figures
from exporter.compare.robustness_report import robustness_method
from exporter.compare.speed import memory_figures, speed_figures
from exporter.compare.tradeoff import TradeOff
from exporter.compare.wording import method_lines, summary_line
from exporter.core.artifact import write_atomic
from exporter.core.cases import Case
from exporter.core.digest import canonical_json, sha256_file, sha256_tree
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent

__all__ = ["Candidate", "Comparison", "Plan", "compare_models", "read_comparison", "write_reports"]


def compare_models(
    candidates: Sequence[Candidate],
    cases: Sequence[Case],
    prompt: str,
    max_new_tokens: int,
    work: Path,
    *,
    threads: int,
    progress: Progress = silent,
    plan: Plan | None = None,
) -> Comparison:
    """Compare `candidates` with the first of them, the reference.

    Processes run one after another. Finished ones are kept in `work`, so that a run that was ended
    goes on where it stopped; their requests carry the digests of model and images. Raises
    `WrongUsage` on bad names, `InputRefused` on bad models or images, `EnvironmentLacks` when a
    process was killed.
    """
    plan = plan or Plan()
    check_candidates(candidates)
    _check_cases(cases)
    setting = Setting(
        cases=tuple(
            JobCase(c.id, str(c.image.resolve()), sha256_file(c.image), c.modality) for c in cases
        ),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        threads=threads,
        work=work,
        digests={c.name: _digest(c) for c in candidates},
        reference_bytes=sum(part_bytes(candidates[0]).values()),
    )
    steps = Steps(progress, len(candidates) + 1 + (1 if plan.speed.seconds else 0), len(cases))
    results = quality_pass(candidates, setting, plan, steps)
    timed = speed_pass(candidates, setting, plan.speed, results, steps)
    return _assemble(candidates, cases, setting, plan, results, timed)


def _digest(candidate: Candidate) -> str:
    path = candidate.model_dir
    return sha256_file(path) if candidate.runtime == "predictions" else sha256_tree(path)


def _check_cases(cases: Sequence[Case]) -> None:
    if not cases:
        raise WrongUsage("no cases to compare on; expected at least one image")
    if len({c.id for c in cases}) != len(cases):
        raise InputRefused("two cases have the same id; give each image its own")
    missing = [c.image for c in cases if not c.image.is_file()]
    if missing:
        raise InputRefused(f"{missing[0]}: no such image ({len(missing)} missing)")


def _assemble(
    candidates: Sequence[Candidate],
    cases: Sequence[Case],
    setting: Setting,
    plan: Plan,
    results: Mapping[str, JobResult],
    timed: Mapping[str, Sequence[JobResult]],
) -> Comparison:
    reference = candidates[0]
    judge = assemble.Judge(cases, results[reference.name].cases)
    judged = {name: judge.judge(result.cases) for name, result in results.items()}
    models = {c.name: c for c in candidates} | {NOISE_FLOOR: reference}
    captions, how = judged_figures(judged, plan.metrics)
    rows = tuple(
        _row(
            name, models[name], setting, results[name], judged, timed.get(name, ()), captions, judge
        )
        for name in results
    )
    floor = noise_floor_threads(setting.threads)
    base = judged[reference.name]
    named = [*(c.name for c in candidates[1:]), *(n for n in judged if n == NOISE_FLOOR)]
    made = Comparison(
        schema=SCHEMA,
        summary="",
        reference=reference.name,
        prompt=setting.prompt,
        max_new_tokens=setting.max_new_tokens,
        images=len(cases),
        patients=len({c.patient for c in cases}),
        captioned=sum(c.caption is not None for c in cases),
        modalities={
            m: sum(c.modality == m for c in cases) for m in sorted({c.modality for c in cases})
        },
        machine=machine(setting.threads, gpu=any(c.device == "cuda" for c in candidates)),
        method=method_lines(rows, setting.threads, floor)
        | {f"metric {name}": line for name, line in how.items()}
        | robustness_method(rows)
        | gpu_method(rows)
        | {"sample size": size_line(plan.gate)},
        rows=rows,
        cases=assemble.case_rows(judged, judge, {c.id: c.sha256 for c in setting.cases}),
        gates=tuple(
            judge_candidate(n, reference.name, judged[n], base, plan.gate, smoke=plan.smoke)
            for n in named
        ),
        not_computed=captions[reference.name].not_computed,
    )
    return msgspec.structs.replace(made, summary=summary_line(made))


def _row(
    name: str,
    candidate: Candidate,
    setting: Setting,
    result: JobResult,
    judged: Mapping[str, Sequence[assemble.Judged]],
    timed: Sequence[JobResult],
    captions: Mapping[str, CaptionFigures],
    judge: assemble.Judge,
) -> Row:
    own, base = judged[name], next(iter(judged.values()))
    first = own is base
    parts = part_bytes(candidate)
    whole = sum(parts.values())
    rouge = assemble.rouge1_figures(own, base)
    truth = assemble.truth_figures(own, base)
    floor = name == NOISE_FLOOR
    return Row(
        name=name,
        role="reference" if first else "noise floor" if floor else "candidate",
        runtime=candidate.runtime,
        threads=noise_floor_threads(setting.threads) if floor else setting.threads,
        model_sha256=setting.digests[candidate.name],
        versions=result.versions,
        parts=parts,
        bytes=whole,
        ratio=whole / setting.reference_bytes,
        length=assemble.length_figures(own),
        speed=speed_figures(timed, setting.threads) if timed else None,
        memory=memory_figures(timed) if timed else None,
        rouge1=rouge[0] if rouge else None,
        rouge1_difference=rouge[1] if rouge and not first else None,
        captions=captions[name].figures,
        caption_differences=captions[name].differences,
        truth=truth[0] if truth else None,
        recall_difference=truth[1] if truth and not first else None,
        moved=None if first else assemble.moved_figures(own),
        distribution=None if first else assemble.distribution_figures(own),
        by_modality=assemble.slices(own),
        robustness=robustness_figures(own, base, judge),
        device=candidate.device,
    )


def write_reports(
    comparison: Comparison,
    out: Path,
    lineage: Mapping[str, Any],
    curves: Mapping[str, TradeOff] | None = None,
) -> None:
    """Write compare.json, cases.jsonl and report.html into `out`; `lineage` and the trade-off
    `curves` of mixed models, by name, are shown in the report.
    """
    bare = msgspec.structs.replace(comparison, cases=())
    write_atomic(out / "compare.json", canonical_json(msgspec.to_builtins(bare)))
    # A path of this machine says nothing elsewhere: the files hold the image's name only.
    rows = [msgspec.structs.replace(c, image=Path(c.image).name) for c in comparison.cases]
    write_atomic(out / "cases.jsonl", b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    write_atomic(out / "report.html", render_report(comparison, lineage, curves).encode())


def read_comparison(path: Path) -> Comparison:
    """Read a compare.json, without its cases. Raises `InputRefused` on another schema."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Comparison)
    except (OSError, msgspec.DecodeError) as error:
        raise InputRefused(f"{path}: not a comparison of schema {SCHEMA} ({error})") from error
    if found.schema != SCHEMA:
        raise InputRefused(f"{path}: schema {found.schema}; expected {SCHEMA}, compare again")
    return found
