"""The stages that make things: merge, quantize, export; each with the key it depends on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporter.calibrate.sets import open_set
from exporter.core.digest import sha256_json
from exporter.core.progress import Progress
from exporter.graphs.export import Compute
from exporter.pipeline import stages as do
from exporter.pipeline.calibrated import claim_scratch, quantize_calibrated
from exporter.pipeline.evaluation import REFERENCE, spread
from exporter.pipeline.job import Build
from exporter.pipeline.mixed import MixedJob, quantize_mixed
from exporter.pipeline.stage import Artifact
from exporter.pipeline.static8 import quantize_static
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.settings import method_settings

# Calibration images on which float16 graphs of the standard dialect are run to find layers that leave
# its range.
EXAMPLES = 4


def merge(b: Build) -> Artifact:
    """The checkpoint in float16 with the adapters merged, and the proof that they changed it."""
    adapters, recipe = [a.path for a in b.found.adapters], b.found.profile.adapter
    return b.stages.run(
        "merge",
        lambda folder, p: do.merge_and_prove(
            b.found.base.path, adapters, folder, recipe=recipe, progress=p
        ),
        version=1,
        parents=[b.found.base.digest, *(a.digest for a in b.found.adapters)],
        options={},
        detail=f"{len(adapters)} adapter(s)",
    )


def quantize(b: Build, merged: Artifact, reference: Artifact, scheme: Scheme) -> Artifact:
    """The merged model as `scheme` stores it; `merged` itself where that quantizes nothing."""
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
        calibrate = quantize_static if scheme.method == "smoothquant" else quantize_calibrated
        note = calibrate(
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


def export(b: Build, source: Artifact, name: str, *, candidate: bool = False) -> Artifact:
    """The graphs of a merged or quantized model; `name` "fp32" stores float weights in 32 bits.

    `candidate`: what is compared, rather than what it is compared with.
    """
    level, dialect = b.target.accuracy_level, b.request.dialect
    # What others are held against is computed in float32, whatever the rest is computed in.
    exact = name in ("fp32", REFERENCE) and not candidate
    compute: Compute = "float32" if exact else b.request.compute
    options: dict[str, Any] = {"fp32": name == "fp32", "accuracy_level": level, "dialect": dialect}
    examples: tuple[Path, ...] = ()
    if compute != "float32":
        options["compute"] = compute
    if compute != "float32" and dialect == "standard":
        images = open_set(b.request.calibration or b.found.profile.calibration)
        examples = tuple(c.image for c in spread(images.cases(), EXAMPLES))
        options["examples"] = images.digest
    return b.stages.run(
        "export",
        lambda folder, p: do.export_folder(
            source.path,
            folder,
            accuracy_level=level,
            float32=name == "fp32",
            dialect=dialect,
            compute=compute,
            examples=examples,
            progress=p,
        ),
        version=1,
        parents=[source.key],
        options=options,
        detail=name,
    )
