"""`medexport build`: resolve, merge, quantize, export, verify, compare, package, in that order."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from exporter.bundle.manifest import Manifest, Usage
from exporter.bundle.package import BundleParts
from exporter.bundle.package import package as write_bundle
from exporter.catalog.profiles import find_model
from exporter.catalog.schema import TargetProfile
from exporter.core.artifact import atomic_directory
from exporter.core.errors import InputRefused, WrongUsage
from exporter.families.tasks import Task
from exporter.graphs.export import refuse_dialect
from exporter.pipeline import judge, make
from exporter.pipeline import stages as do
from exporter.pipeline.budget import read_budget
from exporter.pipeline.calibrated import open_calibration
from exporter.pipeline.evaluation import REFERENCE, Evaluation, open_evaluation
from exporter.pipeline.forecast import check_scheme
from exporter.pipeline.job import Build
from exporter.pipeline.judge import HALF
from exporter.pipeline.outlook import check_fit, check_published_fit
from exporter.pipeline.request import BuildRequest
from exporter.pipeline.resolve import (
    Resolved,
    refuse_plan_only,
    resolve,
    scheme_named,
    weights_at_hand,
)
from exporter.pipeline.stage import Artifact, Reporter, Stages
from exporter.pipeline.targets import choose_target
from exporter.pipeline.task_evaluation import TaskEvaluation, open_task_evaluation
from exporter.pipeline.tools import tool_versions
from exporter.quantizers.schemes import Scheme, find_scheme, for_dialect

if TYPE_CHECKING:
    from exporter.compare.compare import Comparison
    from exporter.compare.tasks.comparison import TaskComparison

WIDTH = 100


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle and what is known about it: a `comparison` of captions, or `tasks` of what
    else the model does.
    """

    bundle: Path
    work: Path
    manifest: Manifest
    comparison: Comparison | None
    smoke: bool
    tasks: TaskComparison | None = None

    def enforce(self) -> None:
        """Raise `GateFailed` or `GateInconclusive` when the comparison did not pass its gate."""
        from exporter.compare.candidates import NOISE_FLOOR
        from exporter.compare.gate import enforce

        found = self.comparison or self.tasks
        if found is None or not found.gates:
            return
        name = self.manifest.scheme
        known = {gate.candidate for gate in found.gates}
        # What quantizes nothing and computes as the reference does is the reference itself.
        name = next((n for n in (name, f"{name}-{HALF}") if n in known), NOISE_FLOOR)
        if self.tasks:
            self.tasks.enforce(name, smoke=self.smoke)
        elif self.comparison:
            enforce(self.comparison.gate(name), smoke=self.smoke)

    def to_json(self) -> dict[str, Any]:
        """For `medexport build --json`."""
        return {
            "bundle": str(self.bundle),
            "digest": self.manifest.digest,
            "scheme": self.manifest.scheme,
            "target": self.manifest.target,
            "checks": self.manifest.checks,
            "comparison": msgspec.to_builtins(self.comparison or self.tasks),
        }

    def to_text(self) -> str:
        """The comparison table and where the bundle lies."""
        from exporter.compare.table import comparison_table

        table = comparison_table(self.comparison) + "\n" if self.comparison else ""
        if self.tasks:
            table = self.tasks.to_text() + "\n"
        return (
            f"\n{table}\nbundle   {self.bundle}\ndigest   {self.manifest.digest}\n"
            f"{checks_text(self.manifest.checks)}\n{self.manifest.statement}\n"
            f"next     medexport run {self.bundle} {self._asked()}; stages are kept in {self.work}"
        )

    def _asked(self) -> str:
        asked: dict[str, str] = {
            "zero-shot": "IMAGE --labels TEXT,TEXT",
            "segmentation": "IMAGE --labels TEXT,TEXT --masks DIR",
            "text-encoder": "FILE.txt",
            "summary": "FILE.txt",
        }
        return asked.get(self.manifest.usage.task, "IMAGE")


def checks_text(checks: Mapping[str, Any]) -> str:
    """What each check of a bundle found, a paragraph each, of lines no longer than `WIDTH`."""
    lines: list[str] = []
    for name, found in checks.items():
        first = f"{'' if lines else 'checks':9}"
        indent = " " * 11
        text = f"{name}: {found}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent)
    return "\n".join(lines)


def build_bundle(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Do what `request` asks and leave the bundle at its `out`.

    Everything that can be refused is refused before the first heavy stage. Raises the errors of
    core.errors; finished stages stay in the work folder and the next run continues from them.
    """
    if request.out.exists():
        raise InputRefused(f"output folder exists: {request.out}; remove it or give another --out")
    target = choose_target(request.target)
    _check_before_download(request, target)
    reporter.begin("resolve", request.model)
    found = resolve(request.model, request.weights, request.adapters, offline=request.offline)
    names = dict.fromkeys((request.scheme, *request.also))
    if found.task:
        refuse_dialect(found.task, request.dialect)
    dialect = request.dialect
    schemes = {n: for_dialect(find_scheme(found.scheme_name(n)), dialect) for n in names}
    mixed = any(scheme.choices for scheme in schemes.values())
    budget = read_budget(request.max_size, request.max_kl, mixed=mixed)
    for scheme in schemes.values():
        check_scheme(found.base.path, scheme, budget)
        if request.compute == "float16":
            refuse_half(scheme, found.task)
    packaged = schemes[request.scheme]
    fit = check_fit(found, packaged, target, here=request.target == "auto")
    evaluation = _evaluation(request, found) if request.compare else None
    calibration = None
    if any(scheme.calibrated for scheme in schemes.values()):
        calibration = open_calibration(
            request.calibration or found.profile.calibration,
            request.calibration_samples,
            request.instruction(found.profile),
            evaluation.images if isinstance(evaluation, Evaluation) else None,
            seed=request.calibration_seed,
        )
    half = request.compute == "float16"
    reporter.expect(count_stages(schemes.values(), compare=request.compare, half=half))
    reporter.end(
        0.0, cached=False, note=f"{found.tensors} tensors, {found.weight_bytes / 1e6:.1f} MB; {fit}"
    )
    request.work_folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(request.work_folder, reporter, request.resume)
    return _run(Build(request, found, target, schemes, stages, evaluation, calibration, budget))


def _check_before_download(request: BuildRequest, target: TargetProfile) -> None:
    """Refuse what cannot fit by its published sizes, where the weights are not at hand."""
    if weights_at_hand(request.model, request.weights):
        return
    profile = find_model(request.model)
    refuse_plan_only(profile)
    scheme = find_scheme(scheme_named(profile, request.scheme))
    check_published_fit(
        profile, for_dialect(scheme, request.dialect), target, here=request.target == "auto"
    )


def refuse_half(scheme: Scheme, task: Task | None) -> None:
    """Raise `WrongUsage` for what no graph computes in float16: models that do not caption, and
    products of integers, which are rounded from float32.
    """
    if task:
        raise WrongUsage(
            f"--compute float16 is for models that caption, and this is a {task} model, which runs on "
            "the CPU alone; leave it out"
        )
    if scheme.method == "smoothquant":
        raise WrongUsage(
            f"--compute float16 and '{scheme.name}' exclude each other: its products are of integers, "
            "for CPUs; choose int8, int4 or fp16"
        )


def count_stages(schemes: Iterable[Scheme], *, compare: bool, half: bool = False) -> int:
    """How many stages a build of these schemes has; `half`: float weights are exported for float16
    arithmetic beside the reference.
    """
    kinds = list(schemes)
    reference = compare or any(s.calibrated for s in kinds)
    per_scheme = sum(2 if s.quantizes else 0 if reference and not half else 1 for s in kinds)
    return 3 + reference + per_scheme + (3 if compare else 0)


def _evaluation(request: BuildRequest, found: Resolved) -> Evaluation | TaskEvaluation:
    if found.task:
        return open_task_evaluation(
            found.task,
            request.evaluation,
            limit=request.limit,
            prompt=request.instruction(found.profile),
            max_new_tokens=found.profile.max_new_tokens,
            threads=request.threads,
            gate=found.profile.task_gate,
        )
    return open_evaluation(
        request.evaluation or found.profile.evaluation,
        limit=request.limit,
        prompt=request.instruction(found.profile),
        max_new_tokens=found.profile.max_new_tokens,
        threads=request.threads,
        gate=found.profile.gate,
        robustness=request.robustness,
    )


def _run(b: Build) -> BuildResult:
    merged = make.merge(b)
    needed = b.evaluation or any(scheme.calibrated for scheme in b.schemes.values())
    reference = make.export(b, merged, REFERENCE) if needed else merged
    quantized = {n: make.quantize(b, merged, reference, s) for n, s in b.schemes.items()}
    exported = {
        name: make.export(b, q, b.schemes[name].name, candidate=True)
        for name, q in quantized.items()
    }
    parity = comparison = None
    if b.evaluation:
        fp32 = make.export(b, merged, "fp32")
        pairs = judge.pair(b, quantized, exported)
        parity = judge.check_parity(b, b.evaluation, merged, fp32, pairs)
        comparison = judge.compare(b, b.evaluation, reference, exported)
    return _package(b, exported[b.request.scheme], parity, comparison)


def _package(
    b: Build, exported: Artifact, parity: Artifact | None, comparison: Artifact | None
) -> BuildResult:
    request, reporter = b.request, b.stages.reporter
    reports, checks = do.collect_reports(
        parity.path if parity else None, comparison.path if comparison else None
    )
    parts = BundleParts(
        name=request.out.name,
        exported=exported.path,
        scheme=b.schemes[request.scheme].name,
        target=b.target.name,
        usage=Usage(
            family=b.found.family,
            prompt=b.prompt,
            max_new_tokens=b.found.profile.max_new_tokens,
            task=b.found.task or "caption",
        ),
        lineage=b.lineage(),
        tools=tool_versions(),
        checks=checks,
        statement=do.statement(b.found.profile.name, checks),
        reports=reports,
    )
    reporter.begin("package", str(request.out))
    with atomic_directory(request.out) as folder:
        manifest = write_bundle(folder, parts, request.sign_key)
    reporter.end(0.0, cached=False, note=f"{len(manifest.files)} files")
    result = BuildResult(request.out, request.work_folder, manifest, None, request.limit > 0)
    if comparison is None:
        return result
    if b.found.task:
        from exporter.compare.tasks.comparison import read_task_comparison

        return replace(result, tasks=read_task_comparison(comparison.path / do.COMPARISON))
    from exporter.compare.compare import read_comparison

    return replace(result, comparison=read_comparison(comparison.path / do.COMPARISON))
