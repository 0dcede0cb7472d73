"""What quantization does to captions: our methods and others on the same model, format and images.

    python benchmarks/quality.py --model FOLDER [--block 64] [--samples 128] [--limit 240]
        [--methods NAME ...] [--bundle NAME=BUNDLE ...] [--threads 2] [--work DIR] [--out FILE]

FOLDER is a merged float16 model. Each method quantizes the decoder's linear layers to 4 bits in
blocks of `--block` (asymmetric where the method can) in a process of its own, with the same
calibration prompts (phantoms-calib, answers included), and everything else stays as it is. What it
stored is turned back into float32 weights, which run in the same float32 graphs as the reference:
the table compares weights, not kernels. `--bundle` adds whole bundles as they are shipped (head,
embedding and vision part quantized too, activations of the decoder in int8).

KL, top-1: teacher-forced on the reference's captions of phantoms-eval. Facts: those of the ground
truth that the caption states. Flips: images with a fact turned over against the reference. Bytes:
decoder linear layers with scales and zero points (scales as float16, nf4's as float32); for a
bundle all its graphs. Seconds and peak memory: the quantizing process, prompts ready.

Others (benchmarks/peers.py) run when they are installed; a row says when one is not.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Array, Found, Task

from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.calibrate.sets import open_set
from exporter.calibrate.walk import walk_decoder
from exporter.compare.compare import Candidate, compare_models
from exporter.compare.memory import peak_rss
from exporter.compare.passes import Plan
from exporter.compare.records import Row
from exporter.compare.speed import SpeedPlan
from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, dequantize
from exporter.core.modelfiles import copy_small_files, read_config
from exporter.core.tensors import Checkpoint
from exporter.families.table import family_of
from exporter.graphs.export import export_model
from exporter.pipeline.evaluation import spread
from exporter.quantizers.block import quantize_block
from exporter.quantizers.gptq import GptqSettings
from exporter.quantizers.plan import LayerPlan, plan_layers
from exporter.quantizers.schemes import Method, Scheme

REFERENCE = "float"


def ours(method: Method) -> Callable[[Task], Found]:
    """One of our methods, block by block with what the quantized blocks before it give."""

    def run(task: Task) -> Found:
        scheme = Scheme(method, method, task.fmt, None, None, None, method)
        tower = family_of(config := read_config(task.model / "config.json")).tower_spec(config)
        plans = plan_layers(task.checkpoint, task.spec, tower, scheme)
        found = Found(nbytes=sum(p.bytes for p in plans if p.format))

        def visit(
            layer: int, weights: Mapping[str, Array], inputs: Mapping[str, InputStatistics]
        ) -> Mapping[str, Array]:
            at = f"{task.spec.prefix}layers.{layer}."
            mine: list[LayerPlan] = [p for p in plans if p.name.startswith(at)]
            made = quantize_block(layer, task.spec, mine, weights, inputs, GptqSettings())
            changed = {n: dequantize(p) for n, p in made.packed.items()} | made.floats
            found.values |= changed
            return changed

        walk_decoder(task.checkpoint, task.spec, task.prompts, visit, threads=task.threads)
        return found

    return run


METHODS: dict[str, Callable[[Task], Found]] = {
    "int4-rtn": ours("rtn-mse"),
    "int4-hqq": ours("hqq"),
    "int4-awq": ours("awq"),
    "int4-gptq": ours("gptq"),
    "int4-awq-gptq": ours("awq+gptq"),
}


@dataclass(frozen=True)
class Line:
    """A row of the table; `note` says why a method has no figures."""

    method: str
    bytes: int = 0
    seconds: float | None = None
    peak_mb: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    facts_right: int | None = None
    flips: int | None = None
    identical: int | None = None
    note: str = ""


def prepare(options: argparse.Namespace) -> None:
    """The float32 graphs of the reference, and the calibration prompts, once for all methods."""
    work: Path = options.work
    if not (work / REFERENCE / "model").is_dir():
        (work / REFERENCE).mkdir(parents=True, exist_ok=True)
        export_model(options.model, work / REFERENCE, float_storage="float32")
    folder = work / "prompts"
    if folder.is_dir():
        return
    images = open_set("phantoms-calib")
    cases = spread(images.cases(), options.samples)
    reference = work / REFERENCE / "model"
    prompts = embed_prompts(options.model, reference, cases, images.prompt, threads=options.threads)
    folder.mkdir()
    for number, p in enumerate(prompts):
        answer = np.array([p.answer.start, p.answer.stop])
        arrays = {"embeds": p.embeds, "image": p.image_positions, "tokens": p.tokens}
        np.savez(folder / f"{number:04}.npz", allow_pickle=False, answer=answer, **arrays)


def read_prompts(folder: Path) -> list[EmbeddedPrompt]:
    """What `prepare` wrote."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as f:
            start, stop = f["answer"].tolist()
            found.append(EmbeddedPrompt(f["embeds"], f["image"], f["tokens"], slice(start, stop)))
    return found


def run_method(options: argparse.Namespace) -> None:
    """One method, in this process: a float32 model folder and figures.json."""
    from safetensors.numpy import save_file

    name = options.run
    config = read_config(options.model / "config.json")
    checkpoint = Checkpoint.open(options.model)
    task = Task(
        options.model,
        checkpoint,
        family_of(config).decoder_spec(config),
        BlockFormat(4, options.block, symmetric=options.symmetric),
        read_prompts(options.work / "prompts"),
        options.threads,
    )
    start = time.perf_counter()
    found = (METHODS | PEERS)[name](task)
    seconds = time.perf_counter() - start
    # Not ru_maxrss: that keeps what the parent had when it started this process.
    peak = (peak_rss() or 0) / 2**20
    missing = set(task.matrices()) - found.values.keys()
    if missing:
        raise SystemExit(f"{name} left {len(missing)} matrices as they were, first {min(missing)}")
    folder = options.work / name / "weights"
    folder.mkdir(parents=True)
    copy_small_files(options.model, folder)
    tensors = {
        n: np.ascontiguousarray(found.values.get(n, checkpoint.float32(n)), np.float32)
        for n in checkpoint.tensors
    }
    save_file(tensors, folder / "model.safetensors")
    figures = {"bytes": found.nbytes, "seconds": seconds, "peak_mb": peak}
    (options.work / name / "figures.json").write_text(json.dumps(figures))


def start_method(options: argparse.Namespace, name: str) -> str:
    """Run one method in a process of its own and export what it made; why not, if it failed."""
    folder = options.work / name
    if (folder / "graphs" / "export.json").is_file():
        return ""
    command = [sys.executable, __file__, "--run", name, "--model", str(options.model)]
    command += ["--work", str(options.work), "--block", str(options.block)]
    command += ["--threads", str(options.threads)] + ["--symmetric"] * options.symmetric
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    (folder / "graphs").mkdir()
    export_model(folder / "weights", folder / "graphs", float_storage="float32")
    return ""


def lines(
    options: argparse.Namespace, failed: Mapping[str, str], rows: Mapping[str, Row]
) -> Iterator[Line]:
    """The table, in the order in which the methods were asked for."""
    for name in [REFERENCE, *options.methods, *(n for n, _ in options.bundle)]:
        row = rows.get(name)
        if row is None:
            yield Line(name, note=failed.get(name, ""))
            continue
        path = options.work / name / "figures.json"
        figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        size = figures.pop("bytes", sum(v for k, v in row.parts.items() if k != "files"))
        told = row.distribution
        yield Line(
            name,
            bytes=size,
            **figures,
            kl_mean=told.kl_mean if told else None,
            kl_p99=told.kl_p99 if told else None,
            top1=told.top1_agreement if told else None,
            facts_right=row.truth.right if row.truth else None,
            flips=round(row.moved.flips.value * row.moved.flips.images) if row.moved else None,
            identical=told.identical if told else None,
        )


def shown(table: Sequence[Line]) -> str:
    """The table as text."""
    head = f"{'method':20} {'bytes':>9} {'KL mean':>8} {'KL p99':>8} {'top-1':>7} {'facts':>5} "
    text = [head + f"{'flips':>5} {'same':>4} {'s':>6} {'MB':>6}"]
    for line in table:
        if line.note:
            text.append(f"{line.method:20} not run: {line.note}")
            continue
        kl = ["-" if v is None else f"{v:.2e}" for v in (line.kl_mean, line.kl_p99)]
        top1 = "-" if line.top1 is None else f"{100 * line.top1:.2f}%"
        rest = [line.facts_right, line.flips, line.identical]
        counts = ["-" if v is None else str(v) for v in rest]
        cost = ["-" if v is None else f"{v:.1f}" for v in (line.seconds, line.peak_mb)]
        text.append(
            f"{line.method:20} {line.bytes:9} {kl[0]:>8} {kl[1]:>8} {top1:>7} {counts[0]:>5} "
            f"{counts[1]:>5} {counts[2]:>4} {cost[0]:>6} {cost[1]:>6}"
        )
    return "\n".join(text)


def main() -> None:
    """Quantize, compare, print and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PEERS])
    parser.add_argument("--bundle", nargs="*", default=[], metavar="NAME=BUNDLE")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if options.run:
        run_method(options)
        return
    options.bundle = [tuple(b.split("=", 1)) for b in options.bundle]
    prepare(options)
    failed = {name: start_method(options, name) for name in options.methods}
    candidates = [Candidate(REFERENCE, options.work / REFERENCE / "model")]
    candidates += [
        Candidate(n, options.work / n / "graphs" / "model") for n, why in failed.items() if not why
    ]
    candidates += [Candidate(n, Path(bundle) / "model") for n, bundle in options.bundle]
    images = open_set("phantoms-eval")
    cases = spread(images.cases(), options.limit)
    made = compare_models(
        candidates,
        cases,
        images.prompt,
        options.max_new_tokens,
        options.work / "compare",
        threads=options.threads,
        plan=Plan(speed=SpeedPlan(seconds=0)),
    )
    table = list(lines(options, failed, {row.name: row for row in made.rows}))
    print(shown(table))
    document = {
        "model": options.model.name,
        "block": options.block,
        "symmetric": options.symmetric,
        "samples": options.samples,
        "images": len(cases),
        "facts": next((r.truth.total for r in made.rows if r.truth), None),
        "rows": [asdict(line) for line in table],
    }
    options.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
