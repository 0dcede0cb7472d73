"""`medexport compare`: bundles, exported folders and predictions, each for what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.bundle.manifest import Manifest
from exporter.bundle.verify import verify_bundle
from exporter.catalog.profiles import model_profiles
from exporter.compare.candidates import Candidate
from exporter.compare.compare import Comparison
from exporter.compare.predictions import predictions_file
from exporter.compare.tasks.records import TaskComparison
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent
from exporter.pipeline.evaluation import IMAGES, compare_candidates, open_evaluation
from exporter.pipeline.task_checks import TaskQuestion, compare_task_models, task_of
from exporter.runtimes.providers import Device

LENGTH = 64


@dataclass(frozen=True)
class Opened:
    """A model to compare, with the manifest of its bundle if it is one."""

    candidate: Candidate
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Asked:
    """Options of `medexport compare`: the set and `limit` of its cases, `robustness` of them perturbed.

    Set None: the shipped one of what the models do. Prompt and length None: those of the first bundle; threads None: the usable cores.
    """

    evaluation: str | None
    limit: int = 0
    prompt: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    robustness: int = 0
    device: Device = "cpu"


def compare_any(
    models: Sequence[str], out: Path, asked: Asked, *, progress: Progress = silent
) -> Comparison | TaskComparison:
    """Compare `models` (PATH or NAME=PATH) with the first; reports go into the folder `out`.

    Prompt, length and margins are those of the first bundle among them, unless given. Raises
    `WrongUsage` for fewer than two and for models that do different things, `InputRefused` for what
    is no model.
    """
    if len(models) < 2:
        raise WrongUsage(
            "one model given; expected a reference and at least one to compare it with"
        )
    opened: list[Opened] = []
    for model in models:
        opened.append(_open(model, {o.candidate.name for o in opened}))
    bundle = next((o.manifest for o in opened if o.manifest), None)
    kinds = {o.candidate.runtime for o in opened}
    if kinds == {"ort"} and any(task_of(o.candidate.model_dir) for o in opened):
        if asked.device != "cpu":
            raise WrongUsage("--device cuda is for models that caption; these run on the CPU")
        question = TaskQuestion(
            asked.evaluation, asked.limit, asked.prompt, asked.max_new_tokens, asked.threads
        )
        paths = {o.candidate.name: o.candidate.model_dir for o in opened}
        return compare_task_models(paths, bundle, out, question, progress=progress)
    profile = model_profiles().get(bundle.lineage.base.name) if bundle else None
    length = asked.max_new_tokens or (bundle.usage.max_new_tokens if bundle else LENGTH)
    evaluation = open_evaluation(
        asked.evaluation or IMAGES,
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
    rows = [_placed(o.candidate, asked.device) for o in opened]
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
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Opened(Candidate(name, path, "torch"))
    raise InputRefused(
        f"{path}: expected a bundle (manifest.json), an exported folder (model/onnx), a merged folder "
        "(config.json and safetensors) or predictions (.jsonl)"
    )


def _placed(candidate: Candidate, device: Device) -> Candidate:
    """The candidate on its device; torch computes in float16 there, as the checkpoint is."""
    if candidate.runtime == "predictions":
        return candidate
    dtype = "float16" if (candidate.runtime, device) == ("torch", "cuda") else "float32"
    return replace(candidate, device=device, dtype=dtype)


def _named(model: str) -> tuple[str, Path]:
    """Name and path; a path that exists is one even with an equals sign in it."""
    name, found, path = model.partition("=")
    if not found or Path(model).exists():
        return Path(model).resolve().name.removesuffix(".jsonl"), Path(model)
    return name, Path(path)
