"""What a profile may say. Unknown keys and wrong types are refused with the place in the file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Scalar = int | float | bool | str | None
Value = Scalar | tuple[int | float | tuple[int, ...], ...]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict, immutable record."""


class Hub(Struct, frozen=True):
    """Where the published checkpoint lies."""

    id: str
    licence: str | None = None
    revision: str | None = None


class Prompts(Struct, frozen=True):
    """The instruction given with each image; `modality_aware` names the image's modality, for which
    ``{modality}`` stands in it ("": none).
    """

    default: str
    modality_aware: str = ""


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
    config: dict[str, Value] = {}
    inferred: dict[str, Value] = {}
    preprocessor: dict[str, Value] = {}
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


class TaskGate(Struct, frozen=True):
    """Margins for models that do other things than caption; compared as those of `Gate` are."""

    auroc_loss: Share = 0.02
    """Macro AUROC of zero-shot labels, or of a classification head, that may get lost (difference,
    paired)."""
    label_change: Share = 0.02
    """Share of images or texts whose most likely label (of images: modality) may be another than the
    reference's."""
    retrieval_loss: Share = 0.02
    """Share of queries, image to text and back, that may newly miss their own among the first five
    (difference, paired)."""
    embedding_shift: Share = 0.02
    """Mean of 1 - cosine between a vector and the reference's for the same image or text."""
    calibration_rise: Share = 0.02
    """Expected calibration error that may be added (difference, paired)."""
    neighbour_loss: Share = 0.1
    """Mean share of the reference's five nearest texts that may no longer be among the five nearest."""
    mask_shift: Share = 0.05
    """Mean of 1 - Dice between a mask and the reference's for the same image and text."""
    mask_loss: Share = 0.02
    """Share of images on which a mask may have a Dice under 0.5 with the reference's."""
    dice_loss: Share = 0.02
    """Mean Dice with ground-truth masks that may get lost (difference, paired)."""
    entity_f1_loss: Share = 0.02
    """F1 of entities against ground truth that may get lost (difference, paired)."""
    entity_shift: Share = 0.05
    """1 - F1 of entities against the reference's."""
    rouge1_loss: Share = 0.02
    """ROUGE-1 F of summaries that may get lost (difference, paired); for ROUGE-L too."""
    facts_right_loss: Share = 0.02
    """Share of the ground-truth summaries' clinical facts that may get lost (difference, paired)."""
    flip_rate: Share = 0.02
    """Share of summaries in which a fact may be turned over against the reference's, and of zero-shot
    images on which a finding may be: present for absent, or absent for present."""
    kl_mean: Positive = 0.1
    """Mean KL divergence per token, in nats, on the reference's own summaries."""
    truncation_rise: Share = 0.02
    """Share of summaries that may newly run into the length limit (difference, paired)."""
    length_low: Share = 0.9
    length_high: Annotated[float, msgspec.Meta(ge=1)] = 1.1
    """All generated tokens against the reference's."""


class Builtin(Struct, frozen=True):
    """Folders shipped with the package, relative to its profiles."""

    model: str
    adapters: dict[str, str] = {}


class ModelProfile(Struct, frozen=True):
    """One model.

    `status` "plan-only": its facts are known, but no family code builds it yet. `max_pixels`: images
    are shrunk to that many before the vision part (None: the image processor's own limit).
    """

    name: str
    title: str
    family: str
    prompts: Prompts
    max_new_tokens: int
    facts: Facts
    hub: Hub | None = None
    builtin: Builtin | None = None
    status: Literal["ready", "plan-only"] = "ready"
    aliases: tuple[str, ...] = ()
    max_pixels: Annotated[int, msgspec.Meta(gt=0)] | None = None
    adapter: AdapterRecipe | None = None
    schemes: dict[str, str] = {}
    evaluation: str = "phantoms-eval"
    calibration: str = "phantoms-calib"
    gate: Gate = Gate()
    task_gate: TaskGate = TaskGate()
    notes: tuple[str, ...] = ()


Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"]
Confidence = Literal["read", "computed", "measured", "assumed", "not re-read"]


class Quantity(Struct, frozen=True):
    """A number with where it comes from.

    "computed": from numbers that were read in `source`; "assumed": a round figure chosen here, and
    `source` says why; "not re-read": known from the vendor's data sheet, which was not at hand.
    """

    value: Positive
    source: str
    confidence: Confidence = "read"


class Label(Struct, frozen=True):
    """A text with where it comes from."""

    value: str
    source: str
    confidence: Confidence = "read"


class Memory(Struct, frozen=True):
    """Memory that a model can use, in GB (10^9 bytes).

    Where CPU and GPU share it (`unified`), the system and a desktop take their part first.
    """

    total_gb: Quantity
    system_gb: Quantity | None = None
    display_gb: Quantity | None = None
    unified: bool = False

    @property
    def usable_bytes(self) -> int:
        """What is left for a model, with a desktop running."""
        taken = sum(q.value for q in (self.system_gb, self.display_gb) if q)
        return int((self.total_gb.value - taken) * 1e9)


class TensorRT(Struct, frozen=True):
    """Versions of TensorRT that build engines for this GPU: the major ones that a source names, and
    the least release (of 10.3 and later, which are what `medexport` takes).
    """

    versions: tuple[str, ...]
    least: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+(\.\d+)?$")]
    source: str
    confidence: Confidence = "read"

    def summary(self) -> str:
        """For tables: ``10.8+``, ``10.13.2+, 11``."""
        later = [v for v in self.versions if v != self.least.partition(".")[0]]
        return ", ".join([f"{self.least}+", *later])


class TargetProfile(Struct, frozen=True):
    """One kind of machine that a bundle is made for.

    `rates`: 10^12 operations a second by precision, dense (a multiply-add is two; figures for
    structured sparsity are halved). `precisions`: in which its tensor cores (of a CPU: its vector
    units) multiply; weights stored in fewer bits run on every target, unpacked to one of these.
    `devices`: names by which the driver calls this GPU.
    `memory` is None where the class says nothing about it (CPUs); `cores`: with how many cores the
    rates of a CPU are meant.
    """

    name: str
    title: str
    provider: str
    accuracy_level: int
    memory: Memory | None = None
    bandwidth_gbs: Quantity | None = None
    compute_capability: Label | None = None
    cores: int | None = None
    rates: dict[Precision, Quantity] = {}
    precisions: tuple[Precision, ...] = ()
    tensorrt: TensorRT | None = None
    devices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
