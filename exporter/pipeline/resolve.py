"""The first stage: which model, which files, which digests. Nothing heavy happens before it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from exporter.catalog.profiles import find_model, model_profiles
from exporter.catalog.schema import Facts, ModelProfile, Prompts
from exporter.core.data import data_root
from exporter.core.digest import sha256_tree
from exporter.core.errors import EnvironmentLacks, InputRefused, WrongUsage, require
from exporter.core.modelfiles import SMALL_FILES
from exporter.core.tensors import Checkpoint, total_bytes
from exporter.families.check import check_config
from exporter.families.checkpoints import published_config
from exporter.families.specs.walked import walked_kind
from exporter.families.table import FAMILIES, TASK_FAMILIES, family_of, task_family_of
from exporter.families.tasks import Task
from exporter.quantizers.schemes import base_name

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
# What --int4 means where a profile does not say. GPTQ has the lowest KL of all methods on both demo
# models (docs/quantization.md), and 0.1 to 0.5 of plain rounding's on random models of every kind of
# decoder whose blocks it walks (test_block_kinds.py); other models are rounded plainly.
DEFAULT_SCHEMES = {"int4": "int4-rtn"}
WALKED_SCHEMES = {"int4": "int4-gptq"}
GENERIC_PROMPT = "Describe the image."


@dataclass(frozen=True)
class ResolvedSource:
    """A folder with the digest of its content."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Resolved:
    """Everything known before the first heavy step. `task`: None for a captioner."""

    profile: ModelProfile
    base: ResolvedSource
    adapters: tuple[ResolvedSource, ...]
    family: str
    tensors: int
    weight_bytes: int
    task: Task | None = None

    def scheme_name(self, asked: str) -> str:
        """The scheme that `asked` stands for in this model's profile."""
        return scheme_named(self.profile, asked)

    def summary(self) -> dict[str, Any]:
        """A JSON-able form for `medexport resolve` and the reports."""
        return {
            "model": self.profile.name,
            "title": self.profile.title,
            "profile": msgspec.to_builtins(self.profile),
            "family": self.family,
            "base": {k: str(v) for k, v in asdict(self.base).items()},
            "adapters": [{k: str(v) for k, v in asdict(a).items()} for a in self.adapters],
            "tensors": self.tensors,
            "weight_bytes": self.weight_bytes,
        }


def resolve(
    model: str, weights: Path | None, adapters: Sequence[str], *, offline: bool
) -> Resolved:
    """Find the profile, the checkpoint and the adapters; check the headers; digest the content.

    `model` is a profile's name, a profile file or a model folder (see `is_model_folder`). Without
    `weights` the checkpoint is the built-in one, or the hub's (the only network access there is, and
    none when `offline`).
    Raises `WrongUsage`, `InputRefused` or `EnvironmentLacks`.
    """
    profile = folder_profile(Path(model)) if is_model_folder(model) else find_model(model)
    refuse_plan_only(profile)
    base = weights or (
        Path(model) if is_model_folder(model) else _own_weights(profile, model, offline)
    )
    if not base.is_dir():
        raise InputRefused(f"{base}: no such folder; expected a model folder with safetensors")
    config = published_config(base)
    check_config(profile, config)
    task = task_family_of(config)
    checkpoint = Checkpoint.open(base)
    folders = [_adapter_folder(profile, a) for a in adapters]
    return Resolved(
        profile=profile,
        base=ResolvedSource(profile.name, base, digest_model(base, checkpoint)),
        adapters=tuple(ResolvedSource(a.name, a, sha256_tree(a)) for a in folders),
        family=family_name(config),
        tensors=len(checkpoint.tensors),
        weight_bytes=total_bytes(checkpoint.tensors.values()),
        task=task.TASK if task else None,
    )


def family_name(config: Mapping[str, Any]) -> str:
    """The name under which the tables have a parsed config.json's family. Raises `InputRefused`."""
    task = task_family_of(config)
    if task is not None:
        return next(n for n, f in TASK_FAMILIES.items() if f is task)
    family = family_of(config)
    return next(n for n, f in FAMILIES.items() if f is family)


def scheme_named(profile: ModelProfile, asked: str) -> str:
    """The scheme that `asked` stands for with this model; what follows a name (-g32) is kept."""
    base = base_name(asked)
    named = profile.schemes.get(base) or DEFAULT_SCHEMES.get(base, base)
    return named + asked.removeprefix(base)


def weights_at_hand(model: str, weights: Path | None) -> bool:
    """Whether a checkpoint can be opened without a download: given, a folder, or shipped."""
    if weights or is_model_folder(model):
        return True
    return find_model(model).builtin is not None


def refuse_plan_only(profile: ModelProfile) -> None:
    """Raises `WrongUsage` when no family code builds this model yet."""
    if profile.status == "plan-only":
        raise WrongUsage(
            f"{profile.title} can be planned but not built yet: there is no code for the "
            f"'{profile.family}' family; `medexport plan` works, `medexport models` lists what builds"
        )


def digest_model(folder: Path, checkpoint: Checkpoint) -> str:
    """Digest over a model folder's small files and weight files; other files do not count."""
    from exporter.core.digest import sha256_file, sha256_json

    names = [n for n in SMALL_FILES if (folder / n).is_file()]
    weights = sorted({info.file.name for info in checkpoint.tensors.values()})
    return sha256_json({n: sha256_file(folder / n) for n in (*names, *weights)})


def is_model_folder(model: str) -> bool:
    """Whether `model` is a folder with a config.json rather than a profile's name or alias.

    A profile goes before a folder of its name, which is meant with a path separator: ``./smolvlm``.
    """
    return _has_config(model) and not any(
        model in (profile.name, *profile.aliases) for profile in model_profiles().values()
    )


def folder_profile(folder: Path) -> ModelProfile:
    """A profile of what a model folder's config.json says. Raises `InputRefused`."""
    config = published_config(folder)
    architectures = config.get("architectures") or [""]
    prompt, schemes = "", {}
    if task_family_of(config) is None:
        family = family_of(config)
        prompt = getattr(family, "DEFAULT_PROMPT", GENERIC_PROMPT)
        schemes = WALKED_SCHEMES if walked_kind(family.decoder_spec(config)) else {}
    return ModelProfile(
        name=folder.resolve().name,
        title=f"model folder {folder.resolve().name}",
        family=family_name(config),
        prompts=Prompts(default=prompt),
        max_new_tokens=128,
        schemes=schemes,
        facts=Facts(architecture=str(architectures[0]), model_type=str(config.get("model_type"))),
    )


def _has_config(model: str) -> bool:
    return (Path(model) / "config.json").is_file()


def _own_weights(profile: ModelProfile, model: str, offline: bool) -> Path:
    if profile.builtin:
        return data_root("profiles") / profile.builtin.model
    folder = f", or --model ./{model} to mean the folder of that name" if _has_config(model) else ""
    if profile.hub is None:
        raise WrongUsage(
            f"profile '{profile.name}' names no hub repository; give --weights DIR{folder}"
        )
    require("huggingface_hub", "build")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                profile.hub.id,
                revision=profile.hub.revision,
                allow_patterns=HUB_PATTERNS,
                local_files_only=offline,
            )
        )
    except Exception as error:  # the hub client raises a dozen kinds for "not reachable"
        why = "not in the local cache, and --offline was given" if offline else type(error).__name__
        raise EnvironmentLacks(
            f"{profile.hub.id}: no weights ({why}); download the repository where there is a "
            f"network and give --weights DIR{folder}"
        ) from error


def _adapter_folder(profile: ModelProfile, name: str) -> Path:
    built_in = profile.builtin.adapters if profile.builtin else {}
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    if name in built_in:
        return data_root("profiles") / built_in[name]
    known = f" or one of the built-in: {', '.join(sorted(built_in))}" if built_in else ""
    raise InputRefused(
        f"adapter {name}: no adapter_config.json there; expected a peft adapter folder{known}"
    )
