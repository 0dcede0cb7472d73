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

    Raises `EnvironmentLacks` without TensorRT or a GPU, `InputRefused` for a bundle of another
    dialect, `ParityFailed` when captions differ: the engines are deleted then.
    """
    load_tensorrt()  # before gigabytes are read
    if asked.check_files:
        manifest = verify_bundle(bundle, progress=progress).manifest
    else:
        manifest = read_manifest(bundle)
    record = bundle / "reports" / EXPORT
    if manifest.dialect != "standard" or not record.is_file():
        lacks = (
            f"has no reports/{EXPORT}" if manifest.dialect == "standard" else "is not for TensorRT"
        )
        raise InputRefused(
            f"{bundle}: its dialect is '{manifest.dialect}' and it {lacks}; expected graphs of the "
            "standard dialect with their optimization profiles: build it with --format tensorrt"
        )
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
        GoldenCase(c.id, c.image, said.get((c.id, sha256_file(c.image)))) for c in chosen.cases
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
