"""Engines for the machine that runs them, from a bundle whose graphs TensorRT's parser takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.manifest import Manifest, read_manifest
from exporter.bundle.package import EXPORT
from exporter.bundle.verify import verify_bundle
from exporter.compare.check import CASES, read_cases
from exporter.compare.compare import read_comparison
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.engines.golden import Golden, GoldenCase
from exporter.engines.options import EngineOptions
from exporter.engines.site import Rebuilt, rebuild
from exporter.pipeline.evaluation import open_evaluation
from exporter.runtimes.trt_api import load_tensorrt

COMPARISON = "compare.json"


@dataclass(frozen=True)
class SiteRequest:
    """Engines of a bundle for this machine, and on how many cases of which set they are tested.

    `workspace`: bytes of GPU memory that a kernel may use (None: as much as there is).
    """

    out: Path | None = None
    workspace: int | None = None
    level: int = 3
    version_compatible: bool = False
    weight_streaming: bool = False
    tf32: bool = False
    evaluation: str = "phantoms-eval"
    cases: int = 4
    threads: int | None = None
    check_files: bool = True


def build_site_engines(bundle: Path, asked: SiteRequest, *, progress: Progress = silent) -> Rebuilt:
    """Build engines from a bundle's graphs on this machine, and prove them on golden cases.

    Raises `InputRefused` for a bundle that engines are not built from, `EnvironmentLacks` without
    TensorRT or a GPU, `ParityFailed` when captions differ: the engines are deleted then.
    """
    manifest = require_engine_bundle(bundle)
    load_tensorrt()  # before gigabytes are read
    if asked.check_files:
        manifest = verify_bundle(bundle, progress=progress).manifest
    record = bundle / "reports" / EXPORT
    options = EngineOptions(
        version_compatible=asked.version_compatible,
        weight_streaming=asked.weight_streaming,
        tf32=asked.tf32,
        level=asked.level,
        workspace=asked.workspace,
    )
    return rebuild(
        bundle,
        record,
        _golden(bundle, manifest, asked),
        out=asked.out,
        options=options,
        threads=asked.threads,
        progress=progress,
    )


def require_engine_bundle(bundle: Path) -> Manifest:
    """The manifest of a bundle whose graphs engines can be built from; no file beside it is read.

    Raises `InputRefused` when there is no bundle, when its model does not caption, and when its graphs
    are of another dialect or come without optimization profiles.
    """
    if not bundle.is_dir():
        raise InputRefused(f"{bundle}: no such folder; expected a bundle")
    manifest = read_manifest(bundle)
    if manifest.usage.task != "caption":
        raise InputRefused(
            f"{bundle}: a {manifest.usage.task} model; engines are built for models that caption, use "
            f"`medexport run {bundle}` on the CPU"
        )
    if manifest.dialect != "standard":
        raise InputRefused(
            f"{bundle}: its dialect is '{manifest.dialect}', which is not for TensorRT; expected graphs "
            "of the standard dialect: build it with --format tensorrt"
        )
    if not (bundle / "reports" / EXPORT).is_file():
        raise InputRefused(
            f"{bundle}: has no reports/{EXPORT}, which holds the optimization profiles of its graphs; "
            "build it again with --format tensorrt"
        )
    return manifest


def _golden(bundle: Path, manifest: Manifest, asked: SiteRequest) -> Golden:
    """Cases of an image set, with the tokens that the bundle's own comparison recorded for them."""
    usage = manifest.usage
    chosen = open_evaluation(
        asked.evaluation,
        limit=asked.cases,
        prompt=usage.prompt,
        max_new_tokens=usage.max_new_tokens,
    )
    said = _recorded(bundle, manifest)
    cases = [
        GoldenCase(c.id, c.image, said.get((c.id, sha256_file(c.image))), c.modality)
        for c in chosen.cases
    ]
    return Golden(cases, usage.prompt, usage.max_new_tokens)


def _recorded(bundle: Path, manifest: Manifest) -> dict[tuple[str, str], tuple[int, ...]]:
    """Tokens of the bundle's captions by case and image digest, where it was asked what its users ask."""
    reports, usage = bundle / "reports", manifest.usage
    if not ((reports / COMPARISON).is_file() and (reports / CASES).is_file()):
        return {}
    comparison = read_comparison(reports / COMPARISON)
    if (comparison.prompt, comparison.max_new_tokens) != (usage.prompt, usage.max_new_tokens):
        return {}
    rows = read_cases(reports / CASES)
    return {
        (case, row.sha256): row.captions[manifest.scheme].ids
        for case, row in rows.items()
        if manifest.scheme in row.captions and row.captions[manifest.scheme].ids
    }
