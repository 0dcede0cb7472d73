"""Reads a PEFT LoRA folder without trust: known keys only, safetensors only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from exporter.adapters.patterns import check_pattern
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import FLOATS, Checkpoint, read_header, refuse_pickle

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1 << 16
# Recorded by peft, without influence on the merged weights.
NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Initialisations that leave the base as it is; the others rewrite it, and the file has no trace of how.
SAME_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of adapter_config.json that decide what the adapter does, with peft's defaults."""

    r: int
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str = True
    ensure_weight_tying: bool = False

    def scaling(self, alpha: float, rank: int) -> float:
        """Alpha / r (LoRA, arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: its settings, its tensors (not loaded) and the digests of both files."""

    folder: Path
    config: AdapterConfig
    tensors: Checkpoint
    config_sha256: str
    weights_sha256: str

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


def read_adapter(folder: Path) -> Adapter:
    """Open a PEFT adapter folder (adapter_config.json, adapter_model.safetensors).

    Raises `InputRefused` for anything but LoRA, for settings that cannot be merged, for unknown keys,
    pickles, damaged files, and tensors that are not floating point.
    """
    config = _parse(folder / CONFIG, read_config(folder / CONFIG))
    weights = folder / WEIGHTS
    if not weights.is_file():
        for name in ("adapter_model.bin", "adapter_model.pt"):
            if (folder / name).is_file():
                refuse_pickle(folder / name)
    read_header(weights)
    tensors = Checkpoint([weights])
    if not tensors.tensors:
        raise InputRefused(f"{weights}: no tensors; expected lora_A and lora_B pairs")
    for info in tensors.tensors.values():
        if info.dtype not in FLOATS:
            raise InputRefused(
                f"{weights}: tensor '{info.name}' is {info.dtype}; expected floating point"
            )
    return Adapter(folder, config, tensors, sha256_file(folder / CONFIG), sha256_file(weights))


def _parse(path: Path, raw: dict[str, Any]) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        raise InputRefused(
            f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA can be merged"
        )
    known = set(AdapterConfig.__struct_fields__)
    kept = {key: value for key, value in raw.items() if key in known}
    for key, value in raw.items():
        # A newer peft may add keys; switched off they change nothing.
        if key not in known and key not in NEUTRAL and value not in (None, False, {}, []):
            raise InputRefused(
                f"{path}: '{key}' is set to {str(value)[:60]!r}, which cannot be merged here; expected "
                "plain LoRA, rsLoRA or DoRA: merge this adapter with its own training library"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if kept.get(key, {}) is None:
            del kept[key]
    try:
        config = msgspec.convert(kept, AdapterConfig)
    except msgspec.ValidationError as error:
        raise InputRefused(f"{path}: {error}; expected what peft writes") from error
    _check_numbers(path, config)
    _check_start(path, config)
    _check_patterns(config)
    return config


def _check_numbers(path: Path, config: AdapterConfig) -> None:
    ranks = (config.r, *config.rank_pattern.values())
    if not all(1 <= rank <= MAX_RANK for rank in ranks):
        raise InputRefused(f"{path}: ranks {sorted(set(ranks))}; expected 1 to {MAX_RANK}")
    alphas = (config.lora_alpha, *config.alpha_pattern.values())
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise InputRefused(f"{path}: lora_alpha is not finite; expected a number")
    if config.use_dora and config.lora_bias:
        raise InputRefused(f"{path}: use_dora together with lora_bias; peft has no such adapter")


def _check_start(path: Path, config: AdapterConfig) -> None:
    start = config.init_lora_weights
    if isinstance(start, str) and start not in SAME_BASE:
        raise InputRefused(
            f"{path}: init_lora_weights is '{start}': training changed the base weights at its start, "
            "and this adapter does not fit the published ones; save it again with peft's "
            "path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )


def _check_patterns(config: AdapterConfig) -> None:
    for pattern in config.rank_pattern:
        check_pattern(pattern, "rank_pattern")
    for pattern in config.alpha_pattern:
        check_pattern(pattern, "alpha_pattern")
    # target_modules as an expression is never matched here: the tensors say what was targeted.
    if isinstance(config.exclude_modules, str):
        check_pattern(config.exclude_modules, "exclude_modules")
    layers = config.layers_pattern
    for pattern in [layers] if isinstance(layers, str) else layers or []:
        check_pattern(pattern, "layers_pattern")
