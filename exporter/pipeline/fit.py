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
from exporter.pipeline.fit_memory import MemoryItem, predict_memory
from exporter.pipeline.fit_sizes import weight_bytes
from exporter.pipeline.fit_speed import LIKELY, LIMIT, Load, Speed, predict_speed
from exporter.quantizers.schemes import Scheme

Verdict = Literal["fits", "tight", "does not fit", "memory not known"]
# The prediction's own error, and the instruction given beside the image.
MARGIN, INSTRUCTION = 0.15, 32
# What an interactive use waits for; where nothing is that fast, finer schemes may be this much slower.
GOOD_SECONDS, SLOWER = 10.0, 1.1


@dataclass(frozen=True)
class Fit:
    """One scheme on one target. Bytes; `limit` is the roofline, `likely` with stated efficiency."""

    scheme: str
    target: str
    weight_bytes: int
    memory: tuple[MemoryItem, ...]
    usable: int | None
    load: Load
    new_tokens: int
    limit: Speed | None
    likely: Speed | None

    @property
    def needed(self) -> int:
        """Predicted peak."""
        return sum(item.bytes for item in self.memory)

    @property
    def verdict(self) -> Verdict:
        """Whether it fits; "tight" is within the prediction's error of what there is."""
        if self.usable is None:
            return "memory not known"
        if self.needed > self.usable:
            return "does not fit"
        return "tight" if self.needed > self.usable * (1 - MARGIN) else "fits"

    @property
    def caption_s(self) -> float | None:
        """Likely seconds of one caption of `new_tokens` tokens."""
        return self.likely.seconds_for(self.new_tokens) if self.likely else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **asdict(self),
            "needed": self.needed,
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

    `context` asks for a longer cache. Raises `InputRefused` when it exceeds the model's.
    """
    d = shape.decoder
    if d is None:
        return Load(0, 0, batch)
    prompt = min(d.image_tokens + INSTRUCTION, d.max_positions)
    if context is not None and context > d.max_positions:
        raise InputRefused(
            f"--context {context}: the model has {d.max_positions} positions; ask for at most that"
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
    return Fit(
        scheme=scheme.name,
        target=target.name,
        weight_bytes=weight_bytes(shape, scheme),
        memory=predict_memory(shape, scheme, target, load),
        usable=target.memory.usable_bytes if target.memory else None,
        load=load,
        new_tokens=profile.max_new_tokens,
        limit=predict_speed(shape, scheme, target, load, LIMIT),
        likely=predict_speed(shape, scheme, target, load, LIKELY),
    )


def recommend(fits: Sequence[Fit]) -> Recommendation:
    """The first of `fits` (finest scheme first) that fits with room and captions within
    `GOOD_SECONDS`; where none does, the finest within a tenth of the fastest; a tight one only when
    there is no other.
    """
    roomy = [f for f in fits if f.verdict in ("fits", "memory not known")]
    candidates = roomy or [f for f in fits if f.verdict == "tight"]
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
    if fit.verdict != "does not fit":
        return
    fitting = [f for f in others if f.verdict in ("fits", "tight")]
    advice = f"build {fitting[0].scheme}" if fitting else "take a larger target or a smaller model"
    message = (
        f"{fit.scheme} needs about {_gb(fit.needed)} on {fit.target}, which has "
        f"{_gb(fit.usable or 0)} for it; {advice} (`medexport plan` shows the sum)"
    )
    raise EnvironmentLacks(message) if here else InputRefused(message)


def _reason(chosen: Fit, fits: Sequence[Fit], *, fast: bool) -> str:
    why = "the finest that fits" if fast else "the finest of the fastest that fit"
    if chosen.verdict == "tight":
        why = "the only one that may fit, within the prediction's error"
    words = {"does not fit": "does not fit", "tight": "is tight"}
    finer = fits[: [f.scheme for f in fits].index(chosen.scheme)]
    skipped = [f"{f.scheme} {words.get(f.verdict, 'is slower')}" for f in finer]
    what = "caption" if chosen.likely and chosen.likely.tokens_per_s else "run"
    seconds = "" if chosen.caption_s is None else f"about {clock(chosen.caption_s)} a {what}"
    return "; ".join(text for text in (why, seconds, ", ".join(skipped)) if text)


def clock(seconds: float) -> str:
    """Seconds from one on, milliseconds below."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
