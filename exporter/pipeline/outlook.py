"""What `medexport plan` says before any file is opened: fit and speed of every scheme on a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.catalog.profiles import find_model
from exporter.catalog.schema import ModelProfile, TargetProfile
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.checkpoints import folder_config
from exporter.families.prompts.textfiles import read_optional
from exporter.families.shapes.find import SHAPES, shape_of, shape_of_config
from exporter.families.shapes.parts import ModelShape
from exporter.pipeline.fit import Fit, Recommendation, clock, predict, recommend, refuse_unfit
from exporter.pipeline.fit_speed import Speed, likely_on
from exporter.pipeline.resolve import Resolved, folder_profile, is_model_folder, scheme_named
from exporter.pipeline.targets import choose_target, machine_targets, unknown_gpu
from exporter.quantizers.schemes import Scheme, find_scheme

# Finest first. `int4` is what the profile makes of it.
CANDIDATES = ("fp16", "int8", "int4", "int4-rtn-small")
HEADER = (
    *("scheme", "weights", "peak memory", "verdict"),
    *("encoder", "first token", "tokens/s", "at most", "in all"),
)


@dataclass(frozen=True)
class TargetOutlook:
    """All schemes on one target, finest first, and the one to take."""

    target: TargetProfile
    fits: tuple[Fit, ...]
    recommended: Recommendation

    def rows(self) -> list[tuple[str, ...]]:
        """One row a scheme, in the order of `HEADER`."""
        return [_row(fit) for fit in self.fits]

    def to_lines(self) -> list[str]:
        """What stands below the table."""
        usable = self.fits[0].usable
        memory = f"{usable / 1e9:.1f} GB for a model" if usable else "memory not known"
        shared = self.target.memory and self.target.memory.unified
        lines = [
            f"{self.target.title}: {memory}"
            + (", after the system and a desktop took theirs" if shared else "")
        ]
        chosen = self.recommended
        lines.append(f"recommended: {chosen.scheme or 'nothing'} ({chosen.why})")
        lines += [
            f"{f.scheme}: {f.cpu_only}" for f in self.fits if f.cpu_only != self.fits[0].cpu_only
        ]
        second = self.fits[0].needed - self.fits[0].least
        if second and not self.fits[0].cpu_only:
            lines.append(
                f"peak memory: with TensorRT; onnxruntime (CUDA) needs {_mb(second)} less (one cache block)"
            )
        if chosen.scheme is None and usable:
            lines += self._ways_out(usable)
        return lines

    def _ways_out(self, usable: int) -> list[str]:
        """What would fit, where nothing does: with one runtime alone, or without a desktop."""
        unfit = [f for f in self.fits if f.verdict == "does not fit"]
        alone = "with onnxruntime (CUDA) alone, which keeps one cache block,"
        lines = [
            f"{alone} {f.scheme} needs {f.least / 1e9:.1f} GB: it would fit"
            for f in [f for f in unfit if not f.barred][:1]
        ]
        display = self.target.memory.display_gb if self.target.memory else None
        more = usable + int(display.value * 1e9) if display else 0
        free = f"without a desktop {more / 1e9:.1f} GB are free:"
        if fitting := [f.scheme for f in unfit if f.needed <= more]:
            return [*lines, f"{free} {fitting[0]} would fit"]
        if fitting := [f.scheme for f in unfit if f.least <= more]:
            return [*lines, f"{free} {fitting[0]} would fit {alone[:-1]}"]
        return lines


@dataclass(frozen=True)
class Outlook:
    """The model's shape and what follows from it on each target; `asked`: the scheme given.

    `left_out`: a GPU of this machine that no profile describes, in a line ("": none).
    """

    profile: ModelProfile
    shape: ModelShape
    asked: str | None
    targets: tuple[TargetOutlook, ...]
    left_out: str = ""

    def headline(self) -> str:
        """Model, size, and what is not there yet."""
        facts = self.profile.facts.confidence
        lacks = "; plan only: no family code yet" if self.profile.status != "ready" else ""
        basis = f" (facts: {facts})" if facts else ""
        unknown = f"\n{self.left_out}" if self.left_out else ""
        size = f"{self.shape.parameters / 1e9:.3g} billion parameters"
        return f"{self.profile.title}: {size}{basis}{lacks}{unknown}"

    def assumptions(self) -> str:
        """What the figures hold for."""
        fit, d = self.targets[0].fits[0], self.shape.decoder
        load = fit.load
        tower, text, share = self.shape.tower, self.shape.text, self._shares()
        read = [f"one image at the image limit ({tower.tiles} tile(s))"] if tower else []
        read += [f"one text of {text.sequence} positions"] if text else []
        if d is None:
            return f"{' and '.join(read)}, the model's limits. {share}."
        batch = f"batch {load.batch}"
        if load.batch > 1:
            batch += f" (texts of one image; tokens/s of all together, in all: until all {load.batch} end)"
        return (
            f"{', '.join(read)}, a prompt of {load.prompt} positions, a context of {load.context}, "
            f"{batch}, {fit.new_tokens} new tokens. {share}; at most: all of both."
        )

    def _shares(self) -> str:
        """What the likely figures take of each target's own, those that were measured apart."""
        shares = {
            f"{e.bandwidth:.0%} of the bandwidth and {e.arithmetic:.0%} of the rate": t.target.name
            for t in self.targets
            for e in [likely_on(t.target)]
        }
        if len(shares) == 1:
            return f"likely: {next(iter(shares))}, of measured figures all"
        each = ", ".join(f"{share} on {name}" for share, name in shares.items())
        return f"likely: {each}, of measured figures all"

    def items(self) -> list[tuple[str, str, str]]:
        """The memory sum of the asked scheme on the first target."""
        fit = self._asked_fit()
        if fit is None or fit.cpu_only:
            return []
        return [(i.name, _mb(i.bytes), i.how) for i in fit.memory]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.profile.name,
            "status": self.profile.status,
            "parameters": self.shape.parameters,
            "facts": self.profile.facts.confidence,
            "assumptions": self.assumptions(),
            "left_out": self.left_out or None,
            "targets": [
                {
                    "target": t.target.name,
                    "schemes": [fit.to_json() for fit in t.fits],
                    "recommended": {"scheme": t.recommended.scheme, "why": t.recommended.why},
                }
                for t in self.targets
            ],
        }

    def _asked_fit(self) -> Fit | None:
        fits = self.targets[0].fits
        return next((f for f in fits if f.scheme == self.asked), None)


def make_outlook(
    model: str,
    weights: Path | None,
    scheme: str | None,
    target: str,
    *,
    context: int | None = None,
    batch: int = 1,
) -> Outlook:
    """Predict every scheme for `target` (``auto``: this machine's GPU and processor).

    Opens a profile, or config.json and preprocessor_config.json of a folder; nothing is downloaded.
    Raises `WrongUsage` on unknown names, `InputRefused` when a size is not known.
    """
    folder = Path(model) if is_model_folder(model) else weights
    profile = folder_profile(Path(model)) if is_model_folder(model) else find_model(model)
    shape = shape_of(profile) if folder is None else _folder_shape(profile, folder)
    asked = find_scheme(scheme_named(profile, scheme)) if scheme else None
    machines = machine_targets() if target == "auto" else (choose_target(target),)
    outlooks = tuple(
        target_outlook(profile, shape, machine, asked, context=context, batch=batch)
        for machine in machines
    )
    left_out = unknown_gpu() if target == "auto" else ""
    return Outlook(profile, shape, asked.name if asked else None, outlooks, left_out)


def target_outlook(
    profile: ModelProfile,
    shape: ModelShape,
    target: TargetProfile,
    asked: Scheme | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
) -> TargetOutlook:
    """All candidate schemes, and the asked one, on one target."""
    schemes = {s.name: s for s in (find_scheme(scheme_named(profile, n)) for n in CANDIDATES)}
    candidates = list(schemes)
    if asked:
        schemes.setdefault(asked.name, asked)
    fits = [
        predict(profile, shape, s, target, context=context, batch=batch) for s in schemes.values()
    ]
    fits.sort(key=lambda f: -f.weight_bytes)
    chosen = recommend([f for f in fits if f.scheme in candidates])
    return TargetOutlook(target, tuple(fits), chosen)


def check_fit(found: Resolved, scheme: Scheme, target: TargetProfile, *, here: bool) -> str:
    """Refuse a build whose bundle cannot run on its target; otherwise a phrase on how much it needs.

    Raises `InputRefused`, or `EnvironmentLacks` when the target is this machine (`here`).
    """
    if found.profile.facts.model_type not in SHAPES:
        return f"fit not predicted: no shape for model_type '{found.profile.facts.model_type}'"
    try:
        shape = _folder_shape(found.profile, found.base.path)
    except InputRefused as error:  # a size that only the prediction asks for stops no build
        return f"fit not predicted: {error}"
    return _refuse_unfit(found.profile, shape, scheme, target, here=here)


def check_published_fit(
    profile: ModelProfile, scheme: Scheme, target: TargetProfile, *, here: bool
) -> None:
    """`check_fit` by the published sizes, before the checkpoint is downloaded.

    Raises as `check_fit` does; sizes that are not published refuse nothing.
    """
    try:
        shape = shape_of(profile)
    except InputRefused:  # the checkpoint's own config.json says them later
        return
    _refuse_unfit(profile, shape, scheme, target, here=here)


def _refuse_unfit(
    profile: ModelProfile, shape: ModelShape, scheme: Scheme, target: TargetProfile, *, here: bool
) -> str:
    result = target_outlook(profile, shape, target, scheme)
    fit = next(f for f in result.fits if f.scheme == scheme.name)
    refuse_unfit(fit, result.fits, here=here)
    where = f" (not on its GPU: {fit.cpu_only})" if fit.cpu_only else ""
    more = f" ({fit.needed / 1e9:.2f} GB with TensorRT)" if fit.least < fit.needed else ""
    return f"needs about {fit.least / 1e9:.2f} GB on {target.name}{more}{where}"


def _folder_shape(profile: ModelProfile, folder: Path) -> ModelShape:
    config, image = folder_config(folder), _image_settings(folder)
    return shape_of_config(profile.title, profile.family, config, image, profile.max_pixels)


def _image_settings(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings, empty where a folder has none."""
    # transformers 5 saves them inside processor_config.json alone.
    nested = read_optional(folder / "processor_config.json").get("image_processor")
    if isinstance(nested, dict):
        return nested
    image = folder / "preprocessor_config.json"
    return read_config(image) if image.is_file() else {}


def _row(fit: Fit) -> tuple[str, ...]:
    weights = f"{fit.weight_bytes / 1e9:.2f} GB"
    peak = "-" if fit.cpu_only else f"{fit.needed / 1e9:.2f} GB"
    head = (fit.scheme, weights, peak, fit.verdict)
    if fit.likely is None or fit.limit is None or fit.caption_s is None:
        return (*head, *["-"] * 5)
    likely: Speed = fit.likely
    vision, first, caption = (
        clock(s) for s in (likely.vision_s, likely.first_token_s, fit.caption_s)
    )
    if not likely.tokens_per_s:
        return (*head, vision, "-", "-", "-", "-")
    return (
        *(*head, vision, first),
        *(f"{likely.tokens_per_s:.1f}", f"{fit.limit.tokens_per_s:.1f}", caption),
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
