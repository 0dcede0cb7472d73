"""Writes docs/fit.md: every model on every target, by scheme, and predictions beside measurements.

    python tools/write_fit.py [--check]

Run it after a change to profiles/, to a scheme or to the prediction; a test compares the file with
what this script would write. Measured figures come from docs/fit.json, which benchmarks/fit.py
writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.catalog.profiles import find_model, find_target, model_profiles, target_profiles
from exporter.catalog.schema import TargetProfile
from exporter.core.errors import InputRefused
from exporter.families.shapes.find import shape_of
from exporter.families.shapes.parts import ModelShape
from exporter.pipeline.fit import INSTRUCTION, MARGIN, Fit, predict
from exporter.pipeline.fit_memory import ARENA, CPU_RUNTIME, GPU_RUNTIME, KERNEL, STEP
from exporter.pipeline.fit_speed import CPU, CPU_LIKELY, LIKELY, LIMIT, Load, predict_speed
from exporter.pipeline.resolve import scheme_named
from exporter.quantizers.schemes import find_scheme

ROOT = Path(__file__).resolve().parents[1]
PAGE, MEASURED = ROOT / "docs/fit.md", ROOT / "docs/fit.json"
# What benchmarks/full_size.py measured: whole bundles, one 640 x 480 image.
WHOLE = ROOT / "docs/full_size.json"
SCHEMES = ("fp16", "int8", "int4")
MOST = 999.5
# Peak resident MB with random weights in onnxruntime 1.31 on x86-64 with AVX2, one thread: one image,
# one text of full length or eight tokens, a tokenizer of the published size.
CONVOLUTIONAL = (
    ("medfilip", "int8", 426),
    ("medfilip", "fp16", 511),
    ("cris", "int8", 680),
    ("cris", "fp16", 889),
    ("cnn-transformer", "int8", 265),
    ("cnn-transformer", "fp16", 470),
)


@dataclass(frozen=True)
class Whole:
    """A measured whole bundle: peak bytes, positions of the prompt, seconds."""

    model: str
    peak: int
    prompt: int
    tokens: int
    first_token_s: float
    per_token_s: float


INTRODUCTION = """\
# Fit: which model on which machine

Written by `tools/write_fit.py`; do not edit. `medexport plan --model NAME --target NAME` prints the
same for one pair, with the sum behind it; `medexport targets --json` has the source of each figure
of a machine, and how sure it is.

Predictions use sizes only: no weights are needed, so models that cannot be built yet (`medexport
models` says which) are here too. The sizes of {unread} were read from no published checkpoint: they are
the defaults of the code that makes one (for cnn-transformer, of this package's own network). Each cell is for one image at the model's image limit, an instruction of
{instruction} tokens and the profile's `max_new_tokens`, batch 1.

- `+7.4 172`: fits, 7.4 GB are left, and at most 172 tokens a second can be written (the roofline:
  bytes of weights and cache that a token reads, over the memory's bandwidth; `>999`: small models
  are bound by launches and the host instead).
- `~0.3 172`: fits by less than {margin:.0%} of the memory, which is the prediction's own error.
- `-0.6`: 0.6 GB are missing. `medexport build --target` refuses this before it starts, unless
  onnxruntime's one cache block (below) would fit.
- `5.8 16` on a processor, whose memory no profile knows: needs 5.8 GB.
- One number only: the model writes no text.
- `CPU`: CLIP kinds, text encoders and T5 run on a processor only; nothing here runs them on a GPU.
  (`int8-static` is for processors too; `medexport plan` marks it `CPU only` on a GPU.)

What is summed: weights as the runtime holds them (float weights become float32 on a CPU, those of
convolutions take {kernel} bytes each there; on a GPU a table that is also the head is in two graphs), the key-value cache (float32 on a CPU, float16 on a GPU; on a GPU also the second block in whole
steps of {step} positions that the TensorRT runtime holds and onnxruntime with CUDA does not, so that
the verdict is safe for both), the activations of the vision part (one tile at
a time; times {arena} on a CPU, whose arena grows by doubling) and of the prefill (attention scores
in full where the kernel keeps them) or, where it is more, what a CPU session takes while it is opened
(the file, where it is small enough to hold the weights, and a second copy of the largest float
matrix), the pixels, the tokenizer where it shares the memory, and
{cpu:.0f} MB (CPU, measured) or {gpu:.0f} MB (GPU, assumed) of runtime. On a Jetson, CPU and GPU share
the memory: the system's and a desktop's part is taken off first. Dense rates are used throughout;
marketing figures for structured sparsity are halved. `medexport plan` also prints a likely speed:
{bandwidth:.0%} of the bandwidth and {arithmetic:.0%} of the rate on a GPU (assumed), {cpu_bandwidth:.0%}
and {cpu_arithmetic:.0%} on a processor (from the whole bundles below), unless the figure was measured.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the page is not current")
    options = parser.parse_args()
    text = render()
    if options.check:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    profiles = sorted(model_profiles().items())
    unread = [name for name, p in profiles if p.facts.confidence == "not published"]
    introduction = INTRODUCTION.format(
        unread=", ".join(unread),
        instruction=INSTRUCTION,
        margin=MARGIN,
        arena=ARENA,
        kernel=KERNEL,
        cpu=CPU_RUNTIME / 1e6,
        gpu=GPU_RUNTIME / 1e6,
        bandwidth=LIKELY.bandwidth,
        arithmetic=LIKELY.arithmetic,
        cpu_bandwidth=CPU_LIKELY.bandwidth,
        cpu_arithmetic=CPU_LIKELY.arithmetic,
        step=STEP,
    )
    shapes, unknown = _shapes()
    parts = [introduction]
    parts.extend(f"## {s}\n\n" + "\n".join(_table(shapes, s)) + "\n" for s in SCHEMES)
    if unknown:
        parts.append("## Not predicted\n\n" + "\n".join(f"- {line}" for line in unknown) + "\n")
    parts.append("## Targets\n\n" + "\n".join(_targets()) + "\n")
    parts.append("\n".join(_measured()) + "\n")
    return "\n".join(parts)


def _shapes() -> tuple[dict[str, ModelShape], list[str]]:
    """Shapes by profile name, and a line for each profile that has none."""
    found, unknown = {}, []
    for name, profile in sorted(model_profiles().items()):
        try:
            found[name] = shape_of(profile)
        except InputRefused as error:
            unknown.append(f"{name}: {error}")
    return found, unknown


def _table(shapes: dict[str, ModelShape], scheme: str) -> Iterator[str]:
    targets = _ordered()
    yield "| model | " + " | ".join(t.name for t in targets) + " |"
    yield "|---|" + "---|" * len(targets)
    for name, shape in shapes.items():
        profile = find_model(name)
        chosen = find_scheme(scheme_named(profile, scheme))
        cells = [_cell(predict(profile, shape, chosen, t)) for t in targets]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _ordered() -> list[TargetProfile]:
    """Processors first, then by memory."""
    return sorted(
        target_profiles().values(),
        key=lambda t: (t.provider != CPU, t.memory.usable_bytes if t.memory else 0, t.name),
    )


def _cell(fit: Fit) -> str:
    if fit.cpu_only:
        return "CPU"
    rate = fit.limit.tokens_per_s if fit.limit else 0.0
    # Above, launches and the host decide: a bound by bandwidth says nothing.
    speed = f" {rate:.0f}" if 0 < rate < MOST else " >999" if rate else ""
    if fit.usable is None:
        return f"{fit.needed / 1e9:.1f}{speed}"
    left = (fit.usable - fit.needed) / 1e9
    if left < 0:
        return f"-{-left:.1f}"
    return f"{'~' if fit.verdict == 'tight' else '+'}{left:.1f}{speed}"


def _targets() -> Iterator[str]:
    yield "| target | machine | GB for a model | GB/s | dense FP16 or FP32, 10^12/s | not re-read |"
    yield "|---|---|---|---|---|---|"
    for t in _ordered():
        memory = f"{t.memory.usable_bytes / 1e9:.1f}" if t.memory else "-"
        bandwidth = f"{t.bandwidth_gbs.value:g}" if t.bandwidth_gbs else "-"
        rate = t.rates.get("fp16") or t.rates.get("fp32")
        unread = [
            name
            for name, fact in (
                ("memory", t.memory.total_gb if t.memory else None),
                ("bandwidth", t.bandwidth_gbs),
                *t.rates.items(),
            )
            if fact and fact.confidence == "not re-read"
        ]
        figure = f"{rate.value:g}" if rate else "-"
        yield (
            f"| {t.name} | {t.title} | {memory} | {bandwidth} | {figure} | "
            f"{', '.join(unread) or '-'} |"
        )


def _measured() -> Iterator[str]:
    yield "## Predicted and measured"
    yield ""
    if not MEASURED.is_file():
        yield "Not measured yet: run `python benchmarks/fit.py --out docs/fit.json`."
        return
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    yield (
        "Peak resident memory (VmHWM) of a process that captions one image at the image limit with "
        f"onnxruntime on the CPU ({found['machine']}, {found['threads']} thread(s)), against the "
        "prediction of this page. The tower runs on two of the tiles, whose rows stand for all (one "
        "takes the memory that each takes), and eight tokens are written into buffers for all. Random "
        "weights of the published shape; the demo model has its own. The arena's factor and the "
        "runtime's part were taken from the first runs of the demo and of SmolVLM-256M, when the "
        "first figure of SmolVLM-500M had been seen: it is no blind test. `python benchmarks/fit.py --out docs/fit.json`, then this script, "
        "repeat it."
    )
    yield ""
    yield "| model | scheme | predicted MB | measured MB | error |"
    yield "|---|---|---|---|---|"
    for row in found["rows"]:
        profile, scheme = find_model(row["model"]), find_scheme(row["scheme"])
        guess = predict(profile, shape_of(profile), scheme, find_target("cpu-avx2")).needed
        peak = row["peak_rss"]
        yield (
            f"| {row['model']} | {row['scheme']} | {guess / 1e6:.0f} | {peak / 1e6:.0f} | "
            f"{(guess - peak) / peak:+.1%} |"
        )
    yield ""
    yield from _convolutional()
    yield ""
    yield from _whole_bundles()
    yield ""
    yield from _speeds()
    yield ""
    yield (
        "No GPU figure here is measured. Where one was taken it is in docs/gpu.md, beside the bound "
        "of this page."
    )


def _convolutional() -> Iterator[str]:
    """Models of convolutions, measured once by hand."""
    yield (
        "Models of convolutions: random weights in onnxruntime 1.31 on x86-64 with AVX2, one thread, one "
        "image, one text of full length or eight tokens, a tokenizer of the published size (no script "
        f"repeats them). The {KERNEL} bytes of a kernel's value were fitted to "
        "MedFILIP and CRIS."
    )
    yield ""
    yield "| model | scheme | predicted MB | measured MB | error |"
    yield "|---|---|---|---|---|"
    for name, scheme, megabytes in CONVOLUTIONAL:
        profile = find_model(name)
        fit = predict(profile, shape_of(profile), find_scheme(scheme), find_target("cpu-avx2"))
        guess = fit.needed / 1e6
        yield f"| {name} | {scheme} | {guess:.0f} | {megabytes} | {guess / megabytes - 1:+.1%} |"


def whole_bundles() -> list[Whole]:
    """The measured whole bundles of docs/full_size.json."""
    found: dict[str, Any] = json.loads(WHOLE.read_text(encoding="utf-8"))
    return [
        Whole(
            row["model"],
            row["run_peak_rss"],
            row["prompt_tokens"],
            row["tokens"],
            row["first_token_seconds"],
            row["seconds_per_token"],
        )
        for row in found["rows"]
    ]


def _speeds() -> Iterator[str]:
    """Seconds of the same runs beside the bound and the likely figure."""
    found: dict[str, Any] = json.loads(WHOLE.read_text(encoding="utf-8"))
    scheme, target = find_scheme(found["scheme"]), find_target("cpu-avx2")
    yield (
        "Speed of the same runs, for their own prompts (likely | measured | error of the likely; in "
        "brackets the bound, which no run may pass). The likely figures are those of the class "
        f"{target.name}, whose bandwidth is a data sheet's and not this machine's: two cores of a shared "
        "machine reach a quarter of it and less, and more than the assumed share of its rate. "
        f"{CPU_LIKELY.bandwidth:.0%} and {CPU_LIKELY.arithmetic:.0%} were set from these very rows "
        "(before: 70 % and 40 %, with tokens up to 2.5 times as fast as measured and first tokens up to "
        "1.9 times as slow), so this is no blind test. SmolVLM-500M was run again behind that (33.5 and "
        "0.033 s when the shares were set). The seconds in docs/fit.json are of a loaded machine and "
        "are not used."
    )
    yield ""
    yield "| model | first token s | measured | error | s/token | measured | error |"
    yield "|---|---|---|---|---|---|---|"
    for row in whole_bundles():
        shape, load = _asked(row.model, shape_of(find_model(row.model))), _load(row)
        least = predict_speed(shape, scheme, target, load, LIMIT)
        likely = predict_speed(shape, scheme, target, load, CPU_LIKELY)
        if least is None or likely is None:
            raise ValueError(f"{target.name} has no bandwidth or rates")
        first, token = likely.first_token_s, 1 / likely.tokens_per_s
        yield (
            f"| {row.model} | {first:.1f} (>= {least.first_token_s:.1f}) | {row.first_token_s:.1f} | "
            f"{first / row.first_token_s - 1:+.0%} | {token:.3f} (>= {1 / least.tokens_per_s:.3f}) | "
            f"{row.per_token_s:.3f} | {token / row.per_token_s - 1:+.0%} |"
        )


def _load(row: Whole) -> Load:
    return Load(row.prompt, row.prompt + row.tokens, 1)


def _whole_bundles() -> Iterator[str]:
    """The prediction for the image that was measured, which is smaller than the image limit."""
    found: dict[str, Any] = json.loads(WHOLE.read_text(encoding="utf-8"))
    yield (
        "Nothing was fitted to these: `medexport run` on a bundle of the whole shape and one 640 x 480 "
        f"image ({found['machine']}, {found['threads']} threads, random weights; "
        "`python benchmarks/full_size.py --tokens 8 --out docs/full_size.json`), against the prediction for an "
        "image of that size. The first figure of Moondream2 was 18 % too low: its crops go through "
        "the tower in one run, which the prediction now knows (and of LLaVA-NeXT's tiles too)."
    )
    yield ""
    yield "| model | scheme | predicted MB | measured MB | error |"
    yield "|---|---|---|---|---|"
    for row in whole_bundles():
        profile, scheme = find_model(row.model), find_scheme(found["scheme"])
        shape = _asked(row.model, shape_of(profile))
        guess = predict(profile, shape, scheme, find_target("cpu-avx2")).needed
        yield (
            f"| {row.model} | {found['scheme']} | {guess / 1e6:.0f} | {row.peak / 1e6:.0f} | "
            f"{(guess - row.peak) / row.peak:+.1%} |"
        )


def _asked(model: str, shape: ModelShape) -> ModelShape:
    """`shape` for a 640 x 480 image: 4 x 3 tiles and the whole for SmolVLM, 9 crops of Moondream2,
    34 x 46 patches of Qwen2-VL.
    """
    tower, decoder = shape.tower, shape.decoder
    if tower is None or decoder is None:
        raise ValueError(f"{model} has no tower or no decoder")
    if model == "smolvlm-500m":
        # 64 rows and two markers a tile, a line break a row of tiles, three about the whole.
        rows = 13 * 64 + 2 * 12 + 3 + 3
        tower, decoder = replace(tower, tiles=13), replace(decoder, image_tokens=rows)
        return replace(shape, tower=tower, decoder=decoder)
    if model == "moondream2":
        return replace(shape, tower=replace(tower, tiles=9, together=9))
    if model == "qwen2-vl-2b-instruct":
        patches, most = 34 * 46, tower.sequence
        rows_of = {most: patches, most // 4: patches // 4}
        weights = tuple(
            replace(w, rows_in=rows_of.get(w.rows_in, w.rows_in)) if w.part == "vision" else w
            for w in shape.weights
        )
        tower = replace(tower, sequence=patches, attended=(patches,) * len(tower.attended))
        return replace(
            shape,
            weights=weights,
            tower=replace(tower, pixels=476 * 644),
            decoder=replace(decoder, image_tokens=patches // 4 + 2),
        )
    return shape


if __name__ == "__main__":
    sys.exit(main())
