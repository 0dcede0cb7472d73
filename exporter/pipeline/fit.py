"""Does a model fit on a machine, how fast can it be there, and which scheme is best for it.

Everything follows from published facts; no weights are needed. docs/fit.md compares the predictions
with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from exporter.catalog.schema import ModelProfile, TargetProfile
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.families.shapes.parts import ModelShape
from exporter.pipeline.fit_memory import SECOND_BLOCK, MemoryItem, predict_memory
from exporter.pipeline.fit_sizes import weight_bytes
from exporter.pipeline.fit_speed import CPU, LIMIT, Load, Speed, likely_on, predict_speed
from exporter.quantizers.schemes import Scheme

Verdict = Literal["fits", "tight", "does not fit", "memory not known", "CPU only"]
# The prediction's own error, and the instruction given beside the image.
MARGIN, INSTRUCTION = 0.15, 32
# What an interactive use waits for; where nothing is that fast, finer schemes may be this much slower.
GOOD_SECONDS, SLOWER = 10.0, 1.1
# What a model of a kind does once; a captioner writes captions.
RUNS = {
    "captioner": "a caption",
    "summariser": "a summary",
    "matcher": "an image with its text",
    "segmenter": "an image with its text",
    "encoder": "a text",
}


@dataclass(frozen=True)
class Fit:
    """One scheme on one target. Bytes; `limit` is the roofline, `likely` with stated efficiency.

    `does`: what the seconds are of, in words. `cpu_only`: why it runs on no GPU, where the target is
    one ("" elsewhere); then there are no speeds.
    """

    scheme: str
    target: str
    weight_bytes: int
    memory: tuple[MemoryItem, ...]
    usable: int | None
    load: Load
    new_tokens: int
    limit: Speed | None
    likely: Speed | None
    does: str = RUNS["captioner"]
    cpu_only: str = ""

    @property
    def needed(self) -> int:
        """Predicted peak, whichever runtime: on a GPU that is TensorRT's."""
        return sum(item.bytes for item in self.memory)

    @property
    def least(self) -> int:
        """Predicted peak with onnxruntime, which needs no second cache block."""
        return sum(item.bytes for item in self.memory if item.name != SECOND_BLOCK)

    @property
    def barred(self) -> bool:
        """Whether it fits with no runtime."""
        return not self.cpu_only and self.usable is not None and self.least > self.usable

    @property
    def verdict(self) -> Verdict:
        """Whether it fits; "tight" is within the prediction's error of what there is."""
        if self.cpu_only:
            return "CPU only"
        if self.usable is None:
            return "memory not known"
        if self.needed > self.usable:
            return "does not fit"
        return "tight" if self.needed > self.usable * (1 - MARGIN) else "fits"

    @property
    def caption_s(self) -> float | None:
        """Likely seconds until a caption of `new_tokens` tokens is there, with the rest of its batch."""
        return self.likely.seconds_for(self.new_tokens) if self.likely else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **asdict(self),
            "needed": self.needed,
            "needed_with_onnxruntime": self.least,
            "verdict": self.verdict,
            "caption_seconds_likely": self.caption_s,
        }


@dataclass(frozen=True)
class Recommendation:
    """The scheme to build for a target (None: none fits), and why, in one line."""

    scheme: str | None
    why: str


def workload(shape: ModelShape, new_tokens: int, context: int | None, batch: int) -> Load:
    """One image at the image limit, an instruction, and `new_tokens` tokens of answer.

    `context` asks for a longer cache, `batch` for more texts. Raises `InputRefused` when the context
    exceeds the model's or does not hold the prompt, and for a model that writes nothing.
    """
    d = shape.decoder
    if d is None:
        _refuse_for_encoder(shape, context, batch)
        return Load(0, 0, 1)
    prompt = min(d.image_tokens + INSTRUCTION, d.max_positions)
    if context is not None and context > d.max_positions:
        raise InputRefused(
            f"--context {context}: the model has {d.max_positions} positions; ask for at most that"
        )
    if context is not None and context < prompt:
        raise InputRefused(
            f"--context {context}: the prompt alone takes {prompt} positions; ask for at least that"
        )
    return Load(prompt, context or min(prompt + new_tokens, d.max_positions), batch)


def predict(
    profile: ModelProfile,
    shape: ModelShape,
    scheme: Scheme,
    target: TargetProfile,
    *,
    context: int | None = None,
    batch: int = 1,
) -> Fit:
    """Peak memory and speed of one scheme on one target."""
    load = workload(shape, profile.max_new_tokens, context, batch)
    cpu_only = "" if target.provider == CPU else _only_on_cpu(shape, scheme)
    limit, likely = (
        None if cpu_only else predict_speed(shape, scheme, target, load, efficiency)
        for efficiency in (LIMIT, likely_on(target))
    )
    return Fit(
        scheme=scheme.name,
        target=target.name,
        weight_bytes=weight_bytes(shape, scheme),
        memory=predict_memory(shape, scheme, target, load),
        usable=target.memory.usable_bytes if target.memory else None,
        load=load,
        new_tokens=_written(load, profile.max_new_tokens),
        limit=limit,
        likely=likely,
        does=RUNS[shape.kind],
        cpu_only=cpu_only,
    )


def _written(load: Load, most: int) -> int:
    """Tokens of one answer: at most those that its context holds."""
    return most if load.context == 0 else max(1, min(most, load.context - load.prompt))


def recommend(fits: Sequence[Fit]) -> Recommendation:
    """The first of `fits` (finest scheme first) that fits with room and captions within
    `GOOD_SECONDS`; where none does, the finest within a tenth of the fastest; a tight one only when
    there is no other.
    """
    roomy = [f for f in fits if f.verdict in ("fits", "memory not known")]
    candidates = roomy or [f for f in fits if f.verdict == "tight"]
    if all(f.cpu_only for f in fits):
        return Recommendation(None, fits[0].cpu_only)
    if not candidates:
        least = min(fits, key=lambda f: f.needed)
        return Recommendation(
            None,
            f"none fits: {least.scheme} needs least, {_gb(least.needed)}, and there are "
            f"{_gb(least.usable or 0)}",
        )
    fastest = min(f.caption_s or 0.0 for f in candidates)
    limit = max(GOOD_SECONDS, SLOWER * fastest)
    chosen = next(f for f in candidates if (f.caption_s or 0.0) <= limit)
    return Recommendation(chosen.scheme, _reason(chosen, fits, fast=fastest <= GOOD_SECONDS))


def refuse_unfit(fit: Fit, others: Sequence[Fit], *, here: bool) -> None:
    """Refuse a build whose bundle cannot run on its target, before anything is done.

    Raises `InputRefused`, or `EnvironmentLacks` when the target is this machine (`here`).
    """
    if not fit.barred:
        return
    fitting = [f for f in others if not f.barred and not f.cpu_only]
    advice = f"build {fitting[0].scheme}" if fitting else "take a larger target or a smaller model"
    message = (
        f"does not fit: {fit.scheme} needs about {_gb(fit.least)} on {fit.target}, which has "
        f"{_gb(fit.usable or 0)} for it; {advice} (`medexport plan` shows the sum)"
    )
    raise EnvironmentLacks(message) if here else InputRefused(message)


def _reason(chosen: Fit, fits: Sequence[Fit], *, fast: bool) -> str:
    why = "the finest that fits" if fast else "the finest of the fastest that fit"
    if chosen.verdict == "tight":
        others = sum(f.verdict == "tight" for f in fits) - 1
        only = "one of those that may fit" if others else "the only one that may fit"
        why = f"{only}, within the prediction's error"
    words = {
        "does not fit": "does not fit",
        "tight": "is as tight and slower" if chosen.verdict == "tight" else "is tight",
        "CPU only": "runs on the CPU only",
    }
    finer = fits[: [f.scheme for f in fits].index(chosen.scheme)]
    skipped = [f"{f.scheme} {words.get(f.verdict, 'is slower')}" for f in finer]
    seconds = "" if chosen.caption_s is None else f"about {clock(chosen.caption_s)} {chosen.does}"
    return "; ".join(text for text in (why, seconds, ", ".join(skipped)) if text)


def _refuse_for_encoder(shape: ModelShape, context: int | None, batch: int) -> None:
    """Raise `InputRefused` for what only a model that writes has."""
    if batch != 1:
        raise InputRefused(
            f"--batch {batch}: a model that writes no text is planned for one at a time; leave it out"
        )
    if context is not None:
        limit = f"; its texts have {shape.text.sequence} positions" if shape.text else ""
        raise InputRefused(
            f"--context {context}: a model that writes no text has no key-value cache{limit}; leave it "
            "out"
        )


def _only_on_cpu(shape: ModelShape, scheme: Scheme) -> str:
    """Why a bundle runs on no GPU ("": it does): the runtimes there are for captioners."""
    if shape.kind != "captioner":
        return "this kind of model runs on the CPU only; plan it for a processor"
    if scheme.method == "smoothquant":
        return f"{scheme.name} is for CPUs; int8 runs on a GPU"
    return ""


def clock(seconds: float) -> str:
    """Seconds from one on, milliseconds below."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
