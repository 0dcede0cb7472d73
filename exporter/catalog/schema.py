"""What a profile may say. Unknown keys and wrong types are refused with the place in the file."""

from __future__ import annotations

import msgspec

Scalar = int | float | bool | str | None


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict, immutable record."""


class Hub(Struct, frozen=True):
    """Where the published checkpoint lies."""

    id: str
    licence: str | None = None
    revision: str | None = None


class Prompts(Struct, frozen=True):
    """The instruction given with each image; `modality_aware` has one per modality."""

    default: str
    modality_aware: dict[str, str] = {}


class AdapterRecipe(Struct, frozen=True):
    """How the study fine-tuned this model: the targets and lora_alpha / r."""

    targets: tuple[str, ...]
    scaling: float | None = None


class Facts(Struct, frozen=True):
    """Published facts that a checkpoint is checked against; None where no public source says.

    Keys of `config` and `inferred` are dotted paths into config.json, absent keys read with the
    class defaults. `inferred` values were not read for this checkpoint: they never refuse one.
    In the names of `tensor_shapes`, ``*`` stands for each layer number.
    """

    architecture: str
    model_type: str
    parameters: int | None = None
    tensors: int | None = None
    stored_dtype: str | None = None
    config: dict[str, Scalar] = {}
    inferred: dict[str, Scalar] = {}
    preprocessor: dict[str, Scalar] = {}
    generation: dict[str, Scalar] = {}
    tensor_shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, int] = {}
    sha256: dict[str, str] = {}
    sources: tuple[str, ...] = ()
    confidence: str = ""
    missing: tuple[str, ...] = ()


class Builtin(Struct, frozen=True):
    """Folders shipped with the package, relative to its profiles."""

    model: str
    adapters: dict[str, str] = {}


class ModelProfile(Struct, frozen=True):
    """One model of a known family."""

    name: str
    title: str
    family: str
    prompts: Prompts
    max_new_tokens: int
    facts: Facts
    hub: Hub | None = None
    builtin: Builtin | None = None
    aliases: tuple[str, ...] = ()
    adapter: AdapterRecipe | None = None
    schemes: dict[str, str] = {}
    evaluation: str = "phantoms-eval"
    calibration: str = "phantoms-calib"
    notes: tuple[str, ...] = ()


class TargetProfile(Struct, frozen=True):
    """One kind of machine that a bundle is made for."""

    name: str
    title: str
    provider: str
    accuracy_level: int
    notes: tuple[str, ...] = ()
