"""`medexport check`: does a new model still say what a released one said?

The baseline is a model, which is run beside the new one, or an earlier comparison (compare.json with
its cases.jsonl), whose captions are read from the file: then no logits exist and the distribution is
not gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from exporter.catalog.schema import Gate
from exporter.compare.assemble import Judge
from exporter.compare.candidates import Candidate, check_candidates
from exporter.compare.compare import Plan, compare_models, read_comparison
from exporter.compare.gate import judge_candidate
from exporter.compare.jobs import CaseResult, JobCase, JobResult, Probe, run_job
from exporter.compare.passes import Setting
from exporter.compare.records import CaptionRow, CaseRow, Comparison
from exporter.compare.speed import SpeedPlan
from exporter.compare.verdict import GateReport
from exporter.core.artifact import write_atomic
from exporter.core.cases import Case
from exporter.core.digest import sha256_bytes, sha256_file, sha256_tree
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent

NEW, BASELINE = "new", "baseline"
CASES = "cases.jsonl"


@dataclass(frozen=True)
class Question:
    """What both models are asked."""

    cases: Sequence[Case]
    prompt: str
    max_new_tokens: int
    threads: int


def check_bundles(
    new: Path,
    baseline: Path,
    question: Question,
    work: Path,
    *,
    gate: Gate,
    smoke: bool = False,
    row: str | None = None,
    progress: Progress = silent,
) -> GateReport:
    """Hold the exported model folder `new` to `baseline` with the margins of `gate`.

    `baseline` is another exported model folder, or a compare.json: then its `row` (by default its
    first candidate) is the baseline. Finished processes are kept in `work` under the digests of
    models and images. Raises `InputRefused` when the baseline was asked something else.
    """
    if baseline.is_dir():
        plan = Plan(SpeedPlan(seconds=0.0), noise_floor=False, gate=gate, smoke=smoke)
        comparison = compare_models(
            [Candidate(BASELINE, baseline), Candidate(NEW, new)],
            question.cases,
            question.prompt,
            question.max_new_tokens,
            work,
            threads=question.threads,
            progress=progress,
            plan=plan,
        )
        return comparison.gate(NEW)
    return _check_report(
        new, baseline, question, work, gate=gate, smoke=smoke, row=row, progress=progress
    )


def _check_report(
    new: Path,
    report: Path,
    question: Question,
    work: Path,
    *,
    gate: Gate,
    smoke: bool,
    row: str | None,
    progress: Progress,
) -> GateReport:
    check_candidates([Candidate(NEW, new)])
    comparison = read_comparison(report)
    name = row or baseline_row(comparison)
    if name not in {r.name for r in comparison.rows}:
        names = ", ".join(r.name for r in comparison.rows)
        raise WrongUsage(f"{report}: no row '{name}'; expected one of {names}")
    asked = (question.prompt, question.max_new_tokens)
    if (comparison.prompt, comparison.max_new_tokens) != asked:
        raise InputRefused(
            f"{report}: made with the prompt {comparison.prompt!r} and at most "
            f"{comparison.max_new_tokens} tokens, not {asked[0]!r} and {asked[1]}; ask the same"
        )
    said = _stored_captions(report, name, question.cases)
    folder = work.resolve() / BASELINE
    stored = JobResult(
        job=f"{sha256_file(report)} {name}", load_seconds=0.0, peak_load=None, peak_run=None,
        unique=None, peak_was_reset=False, versions={}, cases=said,
    )  # fmt: skip
    write_atomic(folder / "result.json", msgspec.json.encode(stored))
    setting = Setting(
        cases=tuple(
            JobCase(c.id, str(c.image.resolve()), sha256_file(c.image), c.modality)
            for c in question.cases
        ),
        prompt=question.prompt,
        max_new_tokens=question.max_new_tokens,
        threads=question.threads,
        work=work,
        digests={NEW: sha256_tree(new)},
        reference_bytes=1,
    )
    # The cases that the earlier run probed, spread alike because the cases are the same.
    job = setting.job(
        Candidate(NEW, new),
        "candidate",
        NEW,
        reference=str(folder),
        reference_job=sha256_bytes(msgspec.json.encode(stored)),
        probes=sum(c.probe is not None for c in said),
    )
    judge = Judge(question.cases, said)
    own, base = judge.judge(run_job(job, progress).cases), judge.judge(said)
    return judge_candidate(NEW, BASELINE, own, base, gate, smoke=smoke)


def baseline_row(comparison: Comparison) -> str:
    """The row that was released: the first candidate, or the reference where there is none."""
    candidates = [r.name for r in comparison.rows if r.role == "candidate"]
    return candidates[0] if candidates else comparison.reference


def _stored_captions(report: Path, name: str, cases: Sequence[Case]) -> list[CaseResult]:
    rows = read_cases(report.with_name(CASES))
    said = []
    for case in cases:
        found = rows.get(case.id)
        if found is None or found.sha256 != sha256_file(case.image):
            what = "is not in" if found is None else "is another image in"
            raise InputRefused(
                f"{case.id} {what} {report.with_name(CASES)}; expected the same evaluation cases"
            )
        said.append(_result(case, found.captions[name]))
    return said


def read_cases(path: Path) -> dict[str, CaseRow]:
    """The cases of a comparison by id. Raises `InputRefused` when the file is missing or damaged."""
    try:
        lines = path.read_bytes().splitlines()
        rows = [msgspec.json.decode(line, type=CaseRow) for line in lines]
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputRefused(
            f"{path}: not the cases of a comparison ({error}); it belongs beside compare.json"
        ) from error
    return {row.id: row for row in rows}


def _result(case: Case, row: CaptionRow) -> CaseResult:
    probe = None
    if row.blank is not None and row.prompt is not None:
        probe = Probe(list(row.blank), row.prompt)
    return CaseResult(
        id=case.id, text=row.text, tokens=list(row.ids), stopped=row.stopped, prompt_tokens=0,
        prepare=0.0, vision=0.0, prefill=0.0, decode=[], probe=probe,
    )  # fmt: skip
