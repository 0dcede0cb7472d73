"""Whether the graphs compute what torch computes, and where they do not.

The float32 export against the torch model: image features, logits, greedy tokens. Each candidate
against torch with the very weights it holds (dequantized): what is left is the kernels' arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.compare.probes import Probe, make_probes
from exporter.core.cases import Case, prompt_for
from exporter.core.errors import ParityFailed, WrongUsage
from exporter.core.modelfiles import read_config
from exporter.core.progress import Progress, silent
from exporter.families.table import family_of
from exporter.runtimes.base import feature_rows
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner

if TYPE_CHECKING:
    from exporter.runtimes.torch_reference import TorchCaptioner

VISION, DECODER = "vision_encoder", "decoder_model_merged"
EXPORT = "fp32 export"
# Float graphs do the same float32 sums in another order. Quantized ones round activations to 8 bits
# before each product (accuracy level 4): about half a step of 1/127 of each block's largest value,
# which adds up over the layers.
FLOAT_BOUND = 2e-4
INT8_ACTIVATION_BOUND = 0.15
# Two logits closer than this share of the row's spread are a tie: float32 does not order them.
TIE = 1e-4
PROBE_TOKENS = 24


class Check(msgspec.Struct, frozen=True):
    """The largest relative error of one graph of one model over all probes, and where it was."""

    model: str
    graph: str
    probes: int
    worst_case: str
    relative_error: float
    bound: float


class ParityReport(msgspec.Struct, frozen=True):
    """What was checked. `ties` are captions that part at two equal logits; the others are identical."""

    summary: str
    checks: tuple[Check, ...]
    captions: int
    ties: int
    tile_counts: tuple[int, ...]
    prompt_lengths: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


@dataclass(frozen=True)
class _Truth:
    """What torch says to one probe: features, its own greedy tokens, their logits."""

    features: NDArray[np.floating]
    tokens: tuple[int, ...]
    logits: NDArray[np.float32]


def check_parity(
    reference: Path,
    exported_fp32: Path,
    candidates: Mapping[str, tuple[Path, Path]],
    cases: Sequence[Case],
    prompt: str,
    max_new_tokens: int,
    *,
    threads: int,
    progress: Progress = silent,
) -> ParityReport:
    """Check `exported_fp32` and each candidate's (float or quantized folder, exported folder).

    Probes are case images and crops of them, so that tile grids differ, with prompts of different
    length. Raises `ParityFailed` naming model, graph, case, value and bound; `WrongUsage` without
    cases.
    """
    if not cases:
        raise WrongUsage("parity needs at least one image; give an evaluation set")
    preparer = family_of(read_config(reference / "config.json")).open_preparer(reference)
    probes = make_probes(preparer, cases, prompt)
    total, done = 2 + 2 * len(candidates), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, what)

    truths, spoken = _ask_torch(reference, probes, cases, prompt, max_new_tokens, threads)
    step("torch reference")
    exported = OrtCaptioner(exported_fp32, threads=threads)
    checks = _compare(EXPORT, exported, probes, truths, FLOAT_BOUND)
    ties = sum(
        _same_tokens(exported, case, prompt, tokens, max_new_tokens)
        for case, tokens in zip(cases, spoken, strict=True)
    )
    step(EXPORT)
    for name, (weights, graphs) in candidates.items():
        truths, _ = _ask_torch(weights, probes, (), prompt, max_new_tokens, threads)
        step(f"torch with the weights of {name}")
        quantized = (weights / "quantization.json").is_file()
        bound = INT8_ACTIVATION_BOUND if quantized else FLOAT_BOUND
        captioner = OrtCaptioner(graphs, threads=threads)
        checks += _compare(name, captioner, probes, truths, bound)
        step(name)
    return ParityReport(
        summary=_summary(checks, len(cases), ties),
        checks=tuple(checks),
        captions=len(cases),
        ties=ties,
        tile_counts=tuple(sorted({len(p.inputs.vision) for p in probes})),
        prompt_lengths=tuple(sorted({len(p.inputs.input_ids) for p in probes})),
    )


def relative_error(reference: NDArray[np.floating], value: NDArray[np.floating]) -> float:
    """Frobenius norm of the difference over that of the reference; infinite if not finite."""
    a, b = reference.astype(np.float64), value.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(b).all():
        return float("inf")
    return float(np.linalg.norm(b - a) / max(float(np.linalg.norm(a)), 1e-30))


def logit_error(reference: NDArray[np.floating], value: NDArray[np.floating]) -> float:
    """Relative error of logits less each row's mean: a constant changes no probability."""
    a, b = reference.astype(np.float64), value.astype(np.float64)
    return relative_error(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True))


def _ask_torch(
    folder: Path,
    probes: Sequence[Probe],
    cases: Sequence[Case],
    prompt: str,
    max_new_tokens: int,
    threads: int,
) -> tuple[list[_Truth], list[tuple[int, ...]]]:
    """What the torch model of `folder` says to the probes, and its captions of the cases."""
    from exporter.runtimes.torch_reference import TorchCaptioner

    torch_model = TorchCaptioner(folder, threads=threads)
    truths = []
    for probe in probes:
        said = torch_model.caption(probe.image, probe.prompt, min(max_new_tokens, PROBE_TOKENS))
        logits = torch_model.score(probe.image, probe.prompt, said.tokens)
        truths.append(_Truth(_torch_features(torch_model, probe), said.tokens, logits))
    spoken = [
        torch_model.caption(
            open_image(c.image), prompt_for(prompt, c.modality), max_new_tokens
        ).tokens
        for c in cases
    ]
    return truths, spoken


def _torch_features(captioner: TorchCaptioner, probe: Probe) -> NDArray[np.float32]:
    """Feature rows ``[rows, width]`` by transformers' own method, not by our runtime's path."""
    import torch

    with torch.inference_mode():
        rows = captioner.family.library_features(captioner.model, probe.inputs)
    features: NDArray[np.float32] = rows.numpy()
    return features


def _compare(
    name: str,
    captioner: OrtCaptioner,
    probes: Sequence[Probe],
    truths: Sequence[_Truth],
    bound: float,
) -> list[Check]:
    errors: dict[str, list[float]] = {VISION: [], DECODER: []}
    for probe, truth in zip(probes, truths, strict=True):
        features = feature_rows(captioner.engine.features(probe.inputs))
        errors[VISION].append(relative_error(truth.features, features))
        logits = captioner.score(probe.image, probe.prompt, truth.tokens)
        errors[DECODER].append(logit_error(truth.logits, logits))
    checks = []
    for graph, values in errors.items():
        worst = int(np.argmax(values))
        if not values[worst] <= bound:
            raise ParityFailed(
                f"{graph} of {name} on case {probes[worst].name}: relative error {values[worst]:.3g} "
                f"to torch with the same weights, expected at most {bound:g}; the graph does not "
                "compute the model, do not use this export"
            )
        checks.append(Check(name, graph, len(values), probes[worst].name, values[worst], bound))
    return checks


def _same_tokens(
    exported: OrtCaptioner, case: Case, prompt: str, tokens: tuple[int, ...], max_new_tokens: int
) -> bool:
    """False when the caption is identical, True when it parts at a tie. Raises `ParityFailed`."""
    image, asked = open_image(case.image), prompt_for(prompt, case.modality)
    said = exported.caption(image, asked, max_new_tokens)
    if said.tokens == tokens:
        return False
    place = next(
        (i for i, (a, b) in enumerate(zip(tokens, said.tokens, strict=False)) if a != b),
        min(len(tokens), len(said.tokens)),
    )
    row = exported.score(image, asked, tokens[:place])[place]
    first, second = np.sort(row)[::-1][:2]
    if first - second <= TIE * float(row.std()):
        return True
    raise ParityFailed(
        f"{EXPORT}: caption of case {case.id} differs from torch at token {place}, where the two best "
        f"logits are {float(first - second):.3g} apart; expected identical greedy tokens"
    )


def _summary(checks: Sequence[Check], captions: int, ties: int) -> str:
    worst: dict[str, float] = {}
    for check in checks:
        worst[check.model] = max(worst.get(check.model, 0.0), check.relative_error)
    errors = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    tied = f", {ties} of them parting at a tie" if ties else ""
    return f"greedy captions identical to torch on {captions} images{tied}; relative error {errors}"
