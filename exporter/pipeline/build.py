"""`medexport build`: resolve, merge, quantize, export, verify, compare, package, in that order."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from exporter.bundle.manifest import Lineage, Manifest, Source, Usage
from exporter.bundle.package import BundleParts
from exporter.bundle.package import package as write_bundle
from exporter.catalog.schema import TargetProfile
from exporter.core.artifact import atomic_directory
from exporter.core.digest import sha256_json
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress
from exporter.pipeline import stages as do
from exporter.pipeline.budget import Budget, read_budget
from exporter.pipeline.calibrated import (
    Calibration,
    claim_scratch,
    open_calibration,
    quantize_calibrated,
)
from exporter.pipeline.evaluation import (
    REFERENCE,
    Evaluation,
    compare_exported,
    open_evaluation,
)
from exporter.pipeline.forecast import check_scheme
from exporter.pipeline.mixed import MixedJob, quantize_mixed
from exporter.pipeline.outlook import check_fit
from exporter.pipeline.request import BuildRequest
from exporter.pipeline.resolve import Resolved, resolve
from exporter.pipeline.stage import Artifact, Reporter, Stages
from exporter.pipeline.static8 import quantize_static
from exporter.pipeline.targets import choose_target
from exporter.pipeline.tools import tool_versions
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import Scheme, find_scheme
from exporter.quantizers.settings import method_settings
from exporter.runtimes.threads import usable_cores

if TYPE_CHECKING:
    from exporter.compare.compare import Comparison


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle and what is known about it."""

    bundle: Path
    work: Path
    manifest: Manifest
    comparison: Comparison | None
    smoke: bool

    def enforce(self) -> None:
        """Raise `GateFailed` or `GateInconclusive` when the comparison did not pass its gate."""
        from exporter.compare.candidates import NOISE_FLOOR
        from exporter.compare.gate import enforce

        if self.comparison and self.comparison.gates:
            name = self.manifest.scheme
            known = {g.candidate for g in self.comparison.gates}
            enforce(self.comparison.gate(name if name in known else NOISE_FLOOR), smoke=self.smoke)

    def to_json(self) -> dict[str, Any]:
        """For `medexport build --json`."""
        return {
            "bundle": str(self.bundle),
            "digest": self.manifest.digest,
            "scheme": self.manifest.scheme,
            "target": self.manifest.target,
            "checks": self.manifest.checks,
            "comparison": msgspec.to_builtins(self.comparison) if self.comparison else None,
        }

    def to_text(self) -> str:
        """The comparison table and where the bundle lies."""
        from exporter.compare.table import comparison_table

        table = comparison_table(self.comparison) + "\n" if self.comparison else ""
        return (
            f"\n{table}\nbundle   {self.bundle}\ndigest   {self.manifest.digest}\n"
            f"checks   {self.manifest.checks}\n{self.manifest.statement}\n"
            f"next     medexport run {self.bundle} IMAGE; stages are kept in {self.work}"
        )


@dataclass(frozen=True)
class _Build:
    """One build under way: the request and what was resolved from it."""

    request: BuildRequest
    found: Resolved
    target: TargetProfile
    schemes: Mapping[str, Scheme]
    stages: Stages
    evaluation: Evaluation | None
    calibration: Calibration | None
    budget: Budget

    @property
    def prompt(self) -> str:
        return self.request.prompt or self.found.profile.prompts.default

    @property
    def threads(self) -> int:
        return self.request.threads or usable_cores()


def build_bundle(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Do what `request` asks and leave the bundle at its `out`.

    Everything that can be refused is refused before the first heavy stage. Raises the errors of
    core.errors; finished stages stay in the work folder and the next run continues from them.
    """
    if request.out.exists():
        raise InputRefused(f"output folder exists: {request.out}; remove it or give another --out")
    target = choose_target(request.target)
    reporter.begin("resolve", request.model)
    found = resolve(request.model, request.weights, request.adapters, offline=request.offline)
    names = dict.fromkeys((request.scheme, *request.also))
    schemes = {n: find_scheme(found.scheme_name(n)) for n in names}
    mixed = any(scheme.choices for scheme in schemes.values())
    budget = read_budget(request.max_size, request.max_kl, mixed=mixed)
    for scheme in schemes.values():
        check_scheme(found.base.path, scheme, budget)
    packaged = schemes[request.scheme]
    fit = check_fit(found, packaged, target, here=request.target == "auto")
    evaluation = _evaluation(request, found) if request.compare else None
    calibration = None
    if any(scheme.calibrated for scheme in schemes.values()):
        calibration = open_calibration(
            request.calibration or found.profile.calibration,
            request.calibration_samples,
            request.prompt or found.profile.prompts.default,
            evaluation.images if evaluation else None,
            seed=request.calibration_seed,
        )
    reporter.expect(count_stages(schemes.values(), compare=request.compare))
    reporter.end(
        0.0, cached=False, note=f"{found.tensors} tensors, {found.weight_bytes / 1e6:.1f} MB; {fit}"
    )
    request.work_folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(request.work_folder, reporter, request.resume)
    return _run(_Build(request, found, target, schemes, stages, evaluation, calibration, budget))


def count_stages(schemes: Iterable[Scheme], *, compare: bool) -> int:
    """How many stages a build of these schemes has."""
    kinds = list(schemes)
    reference = compare or any(s.calibrated for s in kinds)
    per_scheme = sum(2 if s.quantizes else 0 if reference else 1 for s in kinds)
    return 3 + reference + per_scheme + (3 if compare else 0)


def _evaluation(request: BuildRequest, found: Resolved) -> Evaluation:
    return open_evaluation(
        request.evaluation or found.profile.evaluation,
        limit=request.limit,
        prompt=request.prompt or found.profile.prompts.default,
        max_new_tokens=found.profile.max_new_tokens,
        threads=request.threads,
        gate=found.profile.gate,
        robustness=request.robustness,
    )


def _run(b: _Build) -> BuildResult:
    merged = _merge(b)
    needed = b.evaluation or any(scheme.calibrated for scheme in b.schemes.values())
    reference = _export(b, merged, REFERENCE) if needed else merged
    quantized = {n: _quantize(b, merged, reference, scheme) for n, scheme in b.schemes.items()}
    exported = {name: _export(b, q, b.schemes[name].name) for name, q in quantized.items()}
    parity = comparison = None
    if b.evaluation:
        fp32 = _export(b, merged, "fp32")
        parity = _parity(b, b.evaluation, merged, fp32, _pairs(b, quantized, exported))
        comparison = _compare(b, b.evaluation, reference, exported)
    return _package(b, exported[b.request.scheme], parity, comparison)


def _merge(b: _Build) -> Artifact:
    adapters = [a.path for a in b.found.adapters]
    return b.stages.run(
        "merge",
        lambda folder, p: do.merge_and_prove(b.found.base.path, adapters, folder, progress=p),
        version=1,
        parents=[b.found.base.digest, *(a.digest for a in b.found.adapters)],
        options={},
        detail=f"{len(adapters)} adapter(s)",
    )


def _quantize(b: _Build, merged: Artifact, reference: Artifact, scheme: Scheme) -> Artifact:
    if not scheme.quantizes:
        return merged
    calibration = b.calibration if scheme.calibrated else None
    options: dict[str, Any] = {"scheme": repr(scheme), "settings": method_settings(scheme)}
    if calibration:
        options["calibration"] = calibration.options()
    if scheme.choices:
        options["budget"] = b.budget.to_json()

    def make(folder: Path, progress: Progress) -> str:
        if calibration is None:
            quantize_model(merged.path, folder, scheme, threads=b.threads, progress=progress)
            return ""
        scratch = b.stages.work / f"calibration-{scheme.name}.scratch"
        claim_scratch(scratch, sha256_json({"merged": merged.key, "options": options}))
        if scheme.choices:
            job = MixedJob(
                merged=merged.path,
                exported=reference.path,
                out=folder,
                scheme=scheme,
                calibration=calibration,
                budget=b.budget,
                scratch=scratch,
                threads=b.threads,
                progress=progress,
            )
            note = quantize_mixed(job)
            shutil.rmtree(scratch)
            return note
        quantize = quantize_static if scheme.method == "smoothquant" else quantize_calibrated
        note = quantize(
            merged.path,
            reference.path,
            folder,
            scheme,
            calibration,
            scratch,
            threads=b.threads,
            progress=progress,
        )
        shutil.rmtree(scratch)
        return note

    return b.stages.run(
        "quantize",
        make,
        version=1,
        parents=[merged.key],
        options=options,
        detail=f"{scheme.name} on {len(calibration.cases)} images" if calibration else scheme.name,
    )


def _export(b: _Build, source: Artifact, name: str) -> Artifact:
    level = b.target.accuracy_level
    return b.stages.run(
        "export",
        lambda folder, p: do.export_folder(
            source.path, folder, accuracy_level=level, float32=name == "fp32", progress=p
        ),
        version=1,
        parents=[source.key],
        options={"fp32": name == "fp32", "accuracy_level": level, "dialect": "ort"},
        detail=name,
    )


def _pairs(
    b: _Build, quantized: Mapping[str, Artifact], exported: Mapping[str, Artifact]
) -> dict[str, tuple[Artifact, Artifact]]:
    return {
        b.schemes[n].name: (quantized[n], exported[n]) for n in quantized if b.schemes[n].quantizes
    }


def _parity(
    b: _Build,
    evaluation: Evaluation,
    merged: Artifact,
    fp32: Artifact,
    pairs: Mapping[str, tuple[Artifact, Artifact]],
) -> Artifact:
    folders = {
        name: (quantized.path, exported.path) for name, (quantized, exported) in pairs.items()
    }
    return b.stages.run(
        "verify",
        lambda folder, p: do.check_graphs_against_torch(
            merged.path, fp32.path, folders, folder, evaluation, progress=p
        ),
        version=1,
        parents=[merged.key, fp32.key, *(exported.key for _, exported in pairs.values())],
        options=_options(evaluation),
        detail="graphs against torch",
    )


def _compare(
    b: _Build, evaluation: Evaluation, reference: Artifact, exported: Mapping[str, Artifact]
) -> Artifact:
    rows = {b.schemes[n].name: e for n, e in exported.items() if e.key != reference.key}
    return b.stages.run(
        "compare",
        lambda folder, p: compare_exported(
            reference.path,
            {name: artifact.path for name, artifact in rows.items()},
            folder,
            evaluation,
            lineage=_lineage_lines(b),
            scratch=b.stages.work / "compare.scratch",
            progress=p,
        ),
        version=2,
        parents=[reference.key, *(artifact.key for artifact in rows.values())],
        options=_options(evaluation) | {"robustness": evaluation.robustness},
        detail=f"{', '.join(rows) or 'the reference alone'} with fp16",
    )


def _options(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "set": evaluation.images.digest,
        "cases": [c.id for c in evaluation.cases],
        "prompt": evaluation.prompt,
        "tokens": evaluation.max_new_tokens,
        "threads": evaluation.threads,
        "gate": msgspec.to_builtins(evaluation.gate),
        "smoke": evaluation.smoke,
    }


def _package(
    b: _Build, exported: Artifact, parity: Artifact | None, comparison: Artifact | None
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
        ),
        lineage=_lineage(b),
        tools=tool_versions(),
        checks=checks,
        statement=do.statement(b.found.profile.name, checks),
        reports=reports,
    )
    reporter.begin("package", str(request.out))
    with atomic_directory(request.out) as folder:
        manifest = write_bundle(folder, parts, request.sign_key)
    reporter.end(0.0, cached=False, note=f"{len(manifest.files)} files")
    result = None
    if comparison:
        from exporter.compare.compare import read_comparison

        result = read_comparison(comparison.path / do.COMPARISON)
    return BuildResult(request.out, request.work_folder, manifest, result, request.limit > 0)


def _lineage(b: _Build) -> Lineage:
    evaluation = None
    if b.evaluation:
        images, cases = b.evaluation.images, len(b.evaluation.cases)
        evaluation = Source(name=images.name, sha256=images.digest, details={"cases": cases})
    calibration = None
    if b.calibration:
        images = b.calibration.images
        details = {"cases": len(b.calibration.cases), **b.calibration.drawing()}
        calibration = Source(name=images.name, sha256=images.digest, details=details)
    return Lineage(
        calibration=calibration,
        base=do.base_source(b.found.profile, b.found.base.digest),
        adapters=tuple(Source(name=a.name, sha256=a.digest) for a in b.found.adapters),
        evaluation=evaluation,
    )


def _lineage_lines(b: _Build) -> dict[str, str]:
    """The lineage for the report: names and digests, no paths of this machine."""
    lineage = _lineage(b)
    named = [
        ("base", lineage.base),
        ("evaluation set", lineage.evaluation),
        ("calibration set", lineage.calibration),
    ]
    named += [(f"adapter {i}", a) for i, a in enumerate(lineage.adapters, 1)]
    lines = {what: f"{s.name}, sha256 {s.sha256}" for what, s in named if s}
    lines |= {"target": b.target.name, "prompt": b.prompt}
    return lines | {"tools": ", ".join(f"{n} {v}" for n, v in tool_versions().items())}
