"""What a profile may say. Unknown keys and wrong types are refused with the place in the file."""

from __future__ import annotations

from typing import Annotated

import msgspec

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
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


class Gate(Struct, frozen=True):
    """Margins of the gate, fixed before the run: how far a candidate may be from its reference.

    All are compared with one-sided 95 per cent bounds. Shares are of 1: 0.02 is two points.
    """

    facts_right_loss: Share = 0.02
    """Share of the ground truth's clinical facts that may get lost (difference, paired)."""
    contradiction_rise: Share = 0.02
    """Share of images that may newly contradict the ground truth (difference, paired)."""
    flip_rate: Share = 0.02
    """Share of images on which a fact may be turned over against the reference."""
    kl_mean: Positive = 0.1
    """Mean KL divergence per token, in nats, on the reference's own captions."""
    rouge1_loss: Share = 0.02
    """ROUGE-1 F that may get lost (difference, paired)."""
    length_low: Share = 0.9
    length_high: Annotated[float, msgspec.Meta(ge=1)] = 1.1
    """All generated tokens against the reference's."""
    truncation_rise: Share = 0.02
    """Share of captions that may newly run into the length limit (difference, paired)."""
    repetition_rise: Share = 0.02
    """Share of captions that may newly end in a loop (difference, paired)."""
    image_use_loss: Share = 0.1
    """Share of captions that may newly be what a blank image gets (difference, paired)."""
    distinct_loss: Share = 0.1
    """Share of captions that may newly be shared with another patient's (difference, paired)."""


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
    gate: Gate = Gate()
    notes: tuple[str, ...] = ()


class TargetProfile(Struct, frozen=True):
    """One kind of machine that a bundle is made for."""

    name: str
    title: str
    provider: str
    accuracy_level: int
    notes: tuple[str, ...] = ()
