"""`medexport compare`: bundles, exported folders and predictions, each for what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.manifest import Manifest
from exporter.bundle.verify import verify_bundle
from exporter.catalog.profiles import model_profiles
from exporter.compare.candidates import Candidate
from exporter.compare.compare import Comparison
from exporter.compare.predictions import predictions_file
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent
from exporter.pipeline.evaluation import compare_candidates, open_evaluation

LENGTH = 64


@dataclass(frozen=True)
class Opened:
    """A model to compare, with the manifest of its bundle if it is one."""

    candidate: Candidate
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Asked:
    """Options of `medexport compare`: the set and `limit` of its cases, `robustness` of them perturbed.

    Prompt and length None: those of the first bundle; threads None: the usable cores.
    """

    evaluation: str
    limit: int = 0
    prompt: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    robustness: int = 0


def compare_any(
    models: Sequence[str], out: Path, asked: Asked, *, progress: Progress = silent
) -> Comparison:
    """Compare `models` (PATH or NAME=PATH) with the first; reports go into the folder `out`.

    Prompt, length and margins are those of the first bundle among them, unless given. Raises
    `WrongUsage` for fewer than two, `InputRefused` for what is no model.
    """
    if len(models) < 2:
        raise WrongUsage(
            "one model given; expected a reference and at least one to compare it with"
        )
    opened: list[Opened] = []
    for model in models:
        opened.append(_open(model, {o.candidate.name for o in opened}))
    bundle = next((o.manifest for o in opened if o.manifest), None)
    profile = model_profiles().get(bundle.lineage.base.name) if bundle else None
    length = asked.max_new_tokens or (bundle.usage.max_new_tokens if bundle else LENGTH)
    evaluation = open_evaluation(
        asked.evaluation,
        limit=asked.limit,
        prompt=asked.prompt or (bundle.usage.prompt if bundle else None),
        max_new_tokens=length,
        threads=asked.threads,
        gate=profile.gate if profile else None,
        robustness=asked.robustness,
    )
    lineage = {
        o.candidate.name: f"{o.manifest.lineage.base.name}, {o.manifest.scheme}"
        for o in opened
        if o.manifest
    }
    rows = [o.candidate for o in opened]
    return compare_candidates(rows, out, evaluation, lineage=lineage, progress=progress)


def _open(model: str, taken: set[str]) -> Opened:
    """What `model` is. Raises `InputRefused` when it is none of what can be compared."""
    name, path = _named(model)
    base, number = name, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    predictions = predictions_file(path)
    if predictions:
        return Opened(Candidate(name, predictions, "predictions"))
    if (path / "manifest.json").is_file():
        return Opened(Candidate(name, path / "model"), verify_bundle(path).manifest)
    for folder in (path / "model", path):
        if (folder / "onnx").is_dir():
            return Opened(Candidate(name, folder))
    raise InputRefused(
        f"{path}: expected a bundle (manifest.json), an exported folder (model/onnx) or predictions "
        "(.jsonl)"
    )


def _named(model: str) -> tuple[str, Path]:
    """Name and path; a path that exists is one even with an equals sign in it."""
    name, found, path = model.partition("=")
    if not found or Path(model).exists():
        return Path(model).resolve().name.removesuffix(".jsonl"), Path(model)
    return name, Path(path)
