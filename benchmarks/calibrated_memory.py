"""Peak memory and seconds of int4-rtn and int4-gptq, from SmolVLM-500M to LLaVA-7B.

    python benchmarks/calibrated_memory.py [--shapes smolvlm-500m llava-1.5-7b] [--layers 4]
        [--schemes int4-rtn int4-gptq] [--samples 128] [--image-tokens 576] [--text-tokens 64]
        [--spill] [--threads 2] [--folder DIR] [--out result.json]

Weights and prompts are random: memory and time do not depend on the values. The checkpoints have
the shapes of the profiles' published configs, LLaVA-1.5-7B's with 14 GB of float16 weights; they are
written shard by shard and kept in `--folder` for the next run. Each row runs in a process of its own; peak
memory is the kernel's high-water mark of resident memory, cleared after the imports and the
prompts' making, which the marks include. `--layers` limits the decoder: a block's memory does not
depend on how many there are, time does. Embedding the calibration images is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from build_500m import measured
from shapes import write_checkpoint

from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec, VisionSpec
from exporter.families.table import family_of

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"int4-rtn": 3e9, "int4-gptq": 8e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["smolvlm-500m", "llava-1.5-7b"])
    parser.add_argument("--schemes", nargs="+", default=list(LIMITS))
    parser.add_argument("--layers", type=int, help="decoder blocks at most")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--spill", action="store_true", help="hidden states on disk")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here and reuse them")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_row(options, options.folder, options.child)))
    elif options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        report(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="calibrated-memory-") as folder:
            report(options, Path(folder))


def report(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for shape in options.shapes:
        checkpoint = folder / checkpoint_name(shape, options.layers)
        if not checkpoint.is_dir():
            write_checkpoint(checkpoint, shape, options.layers)
        for scheme in options.schemes:
            row = run_child(options, checkpoint, scheme)
            rows.append({"shape": shape, "scheme": scheme} | row)
            print_row(rows[-1], header=len(rows) == 1)
    print_growth(rows, options.schemes)
    result = {
        "rows": rows,
        "samples": options.samples,
        "image_tokens": options.image_tokens,
        "text_tokens": options.text_tokens,
        "spill": options.spill,
        "threads": options.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_end": os.getloadavg()[0],
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run_child(options: argparse.Namespace, checkpoint: Path, scheme: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", scheme, "--folder", str(checkpoint)]
    for name in ("samples", "image_tokens", "text_tokens", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--spill"] if options.spill else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def run_row(options: argparse.Namespace, checkpoint: Path, name: str) -> dict[str, Any]:
    """One scheme on one checkpoint, in this process."""
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme

    scheme, threads = find_scheme(name), options.threads
    work = checkpoint.with_name(f"{checkpoint.name}-{name}")
    shutil.rmtree(work, ignore_errors=True)
    out = work / "quantized"
    out.mkdir(parents=True)
    decoder, _ = specs(checkpoint)
    if scheme.calibrated:
        prompts = random_prompts(options, decoder)
        row = measured(lambda: calibrated(options, checkpoint, work, prompts, name))
    else:
        row = measured(lambda: quantize_model(checkpoint, out, scheme, threads=threads))
    sizes = {"float16_bytes": checkpoint, "quantized_bytes": out}
    row |= {key: sum(p.stat().st_size for p in f.glob("*.safetensors")) for key, f in sizes.items()}
    shutil.rmtree(work)
    return row | {"layers": decoder.layers, "calibrated": scheme.calibrated}


def calibrated(
    options: argparse.Namespace,
    checkpoint: Path,
    work: Path,
    prompts: list[EmbeddedPrompt],
    name: str,
) -> None:
    from exporter.calibrate.walk import walk_decoder
    from exporter.quantizers.plan import plan_layers
    from exporter.quantizers.schemes import find_scheme
    from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble

    decoder, tower = specs(checkpoint)
    scheme, tensors = find_scheme(name), Checkpoint.open(checkpoint)
    store = BlockStore(work / "blocks", "benchmark")
    visitor = BlockQuantizer(store, decoder, plan_layers(tensors, decoder, tower, scheme))
    spill = work / "states" if options.spill else None
    walk_decoder(
        tensors, decoder, prompts, visitor, spill=spill, threads=options.threads, progress=tell
    )
    assemble(checkpoint, work / "quantized", scheme, decoder, store, threads=options.threads)


def tell(done: int, total: int, what: str = "") -> None:
    if done % max(1, total // 50) == 0:
        print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def random_prompts(options: argparse.Namespace, spec: DecoderSpec) -> list[EmbeddedPrompt]:
    rng = np.random.default_rng(0)
    length = options.image_tokens + options.text_tokens
    places = np.arange(length) < options.image_tokens
    return [
        EmbeddedPrompt(
            rng.standard_normal((length, spec.hidden_size), dtype=np.float32),
            places,
            rng.integers(0, spec.vocab_size, length),
            slice(length - options.text_tokens // 2, length),
        )
        for _ in range(options.samples)
    ]


def print_row(row: dict[str, Any], *, header: bool) -> None:
    if header:
        print(
            f"{'shape':14} {'scheme':10} {'blocks':>6} {'seconds':>8} {'cpu s':>8} {'peak GB':>8}"
        )
    print(
        f"{row['shape']:14} {row['scheme']:10} {row['layers']:6} {row['seconds']:8.1f} "
        f"{row['cpu_seconds']:8.1f} {row['peak_rss'] / 1e9:8.2f}",
        flush=True,
    )


def print_growth(rows: list[dict[str, Any]], schemes: list[str]) -> None:
    for scheme in schemes:
        found = [row for row in rows if row["scheme"] == scheme]
        limit = LIMITS.get(scheme)
        if limit:
            kept = "within" if found[-1]["peak_rss"] < limit else "ABOVE"
            print(f"{scheme}: {kept} its limit of {limit / 1e9:.0f} GB at {found[-1]['shape']}")
        if len(found) > 1:
            memory, size = (found[-1][k] / found[0][k] for k in ("peak_rss", "float16_bytes"))
            print(f"{scheme}: {memory:.2f} times the memory for {size:.1f} times the weights")


def specs(checkpoint: Path) -> tuple[DecoderSpec, VisionSpec]:
    config = json.loads((checkpoint / "config.json").read_bytes())
    family = family_of(config)
    return family.decoder_spec(config), family.tower_spec(config)


def checkpoint_name(shape: str, layers: int | None) -> str:
    return f"{shape}-{layers}" if layers else shape


if __name__ == "__main__":
    main()
