"""What each stage does with folders: shared by `medexport build` and the stages' own commands."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from exporter.adapters.expected import differences
from exporter.adapters.merge import merge_adapters
from exporter.bundle.manifest import Lineage, Manifest, Source, Usage
from exporter.bundle.package import BundleParts
from exporter.bundle.package import package as write_bundle
from exporter.catalog.schema import AdapterRecipe, ModelProfile
from exporter.compare.tradeoff import TRADEOFF
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.core.progress import Progress, silent
from exporter.graphs.export import Compute, Dialect, export_model
from exporter.graphs.half import halve_export
from exporter.pipeline.evaluation import Evaluation, spread
from exporter.pipeline.targets import choose_target
from exporter.pipeline.tools import tool_versions
from exporter.runtimes.images import open_image

PROOF, PARITY, COMPARISON = "merge_logits.json", "parity.json", "compare.json"
QUANTIZATION, JUNIT = "quantization.json", "junit.xml"
# Above this size the logits of the whole model are not computed a second time in torch.
PROOF_LIMIT = 4 << 30
PARITY_CASES = 16


def merge_and_prove(
    checkpoint: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    prove: bool = True,
    recipe: AdapterRecipe | None = None,
    progress: Progress = silent,
) -> str:
    """Merge into `out` and, with adapters, prove that merged logits are the adapter's.

    Returns a line on how the adapters differ from the profile's `recipe`; empty where they do not.
    """
    merged = merge_adapters(checkpoint, adapters, out, progress=progress)
    if adapters and prove:
        from exporter.adapters.prove import prove_logits

        proof = prove_logits(checkpoint, adapters, out, limit_bytes=PROOF_LIMIT)
        (out / PROOF).write_bytes(canonical_json(proof.to_json()))
    return differences(merged, recipe) if recipe else ""


def export_folder(
    source: Path,
    out: Path,
    *,
    accuracy_level: int,
    float32: bool = False,
    dialect: Dialect = "ort",
    compute: Compute = "float32",
    examples: Sequence[Path] = (),
    progress: Progress = silent,
) -> None:
    """Export a merged or quantized folder; keeps the layer list beside it.

    With `compute` float16 graphs of the dialect `ort` run on a GPU alone, and those of `standard` keep
    layers in float32 that leave float16's range on the images `examples` (none: drawn ones).
    """
    halve = compute == "float16" and dialect == "ort"
    export_model(
        source,
        out,
        dialect=dialect,
        compute="float32" if halve else compute,
        examples=[open_image(path) for path in examples],
        float_storage="float32" if float32 else "float16",
        accuracy_level=accuracy_level,
        progress=progress,
    )
    if halve:
        halve_export(out)
    for name in (QUANTIZATION, TRADEOFF):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def check_graphs_against_torch(
    merged: Path,
    fp32: Path,
    candidates: Mapping[str, tuple[Path, Path]],
    out: Path,
    evaluation: Evaluation,
    *,
    progress: Progress = silent,
) -> None:
    """Parity of every graph with torch on some evaluation images; writes parity.json into `out`."""
    from exporter.compare.parity import check_parity

    report = check_parity(
        merged,
        fp32 / "model",
        {n: (quantized, exported / "model") for n, (quantized, exported) in candidates.items()},
        spread(evaluation.cases, PARITY_CASES),
        evaluation.prompt,
        evaluation.max_new_tokens,
        threads=evaluation.threads,
        progress=progress,
    )
    (out / PARITY).write_bytes(canonical_json(report.to_json()))


@dataclass(frozen=True)
class PackageFolders:
    """What `medexport package` is given: folders and files that other commands wrote."""

    exported: Path
    resolved: Path
    scheme: str
    target: str = "auto"
    parity: Path | None = None
    comparison: Path | None = None
    prompt: str | None = None
    sign_key: Path | None = None


def package_folders(out: Path, name: str, given: PackageFolders) -> Manifest:
    """Write the bundle `name` into `out` from folders that the stages' own commands wrote."""
    found = read_json(given.resolved)
    try:
        profile = msgspec.convert(found["profile"], ModelProfile)
        base = base_source(profile, found["base"]["digest"])
        adapters = tuple(Source(name=a["name"], sha256=a["digest"]) for a in found["adapters"])
        family = str(found["family"])
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise InputRefused(
            f"{given.resolved}: not what `medexport resolve --json` prints ({error!r})"
        ) from error
    reports, checks = collect_reports(given.parity, given.comparison)
    parts = BundleParts(
        name=name,
        exported=given.exported,
        scheme=given.scheme,
        target=choose_target(given.target).name,
        usage=Usage(
            family=family,
            prompt=given.prompt or profile.prompts.default,
            max_new_tokens=profile.max_new_tokens,
        ),
        lineage=Lineage(base=base, adapters=adapters),
        tools=tool_versions(),
        checks=checks,
        statement=statement(profile.name, checks),
        reports=reports,
    )
    return write_bundle(out, parts, given.sign_key)


def base_source(profile: ModelProfile, digest: str) -> Source:
    """Lineage entry of a base checkpoint, with what its profile says of licence and origin."""
    hub = profile.hub
    details = {"hub": hub.id, "licence": hub.licence, "revision": hub.revision} if hub else {}
    return Source(name=profile.name, sha256=digest, details=details)


def collect_reports(
    parity: Path | None, comparison: Path | None
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Report files of a bundle by name, and one line per check for manifest and card."""
    reports: dict[str, Path] = {}
    checks: dict[str, Any] = {"parity": "not run", "comparison": "not run"}
    if parity:
        reports[PARITY] = parity / PARITY
        checks["parity"] = read_json(parity / PARITY)["summary"]
    if comparison:
        for name in (COMPARISON, "cases.jsonl", "report.html"):
            reports[name] = comparison / name
        if (comparison / JUNIT).is_file():
            reports[JUNIT] = comparison / JUNIT
        checks["comparison"] = read_json(comparison / COMPARISON)["summary"]
    return reports, checks


def statement(model: str, checks: Mapping[str, Any]) -> str:
    """What a reader of the bundle must know first."""
    text = "Not a medical device; nothing here is a claim of conformity."
    if model == "demo":
        text = "Trained on computer drawings, not on medical images: a demonstration only. " + text
    unchecked = sorted(name for name, value in checks.items() if value == "not run")
    if unchecked:
        text += f" Built without {' and '.join(unchecked)}: nothing is known about what it says."
    return text
