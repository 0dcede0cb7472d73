"""Builds of full-size shapes with random weights, and captions out of their bundles.

    python benchmarks/full_size.py [--models smolvlm-500m ...] [--scheme int4-rtn] [--tokens 16]
        [--threads 2] [--folder DIR] [--keep] [--out result.json]

For each model: a float16 checkpoint of the published shape is written; `medexport build` makes a
bundle of it, as its user would, without a comparison (random weights say nothing that could be
compared) in a process of its own; `medexport run` captions one 640 x 480 image in another. Seconds
are of the wall clock, memory is the processes' highest resident memory. A checkpoint and its stages
take four times the float16 weights on disk and are removed after each model unless `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shapes import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("smolvlm-500m", "qwen2-vl-2b-instruct", "moondream2", "llava-1.5-7b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--scheme", default="int4-rtn")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where checkpoints and bundles are written")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=options.folder) as place:
        rows = []
        for model in options.models:
            folder = (options.folder or Path(place)) / model
            rows.append(measure(model, folder, options))
            print_row(rows[-1], header=len(rows) == 1)
            if not options.keep:
                shutil.rmtree(folder)
            if options.out:
                write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    result = {
        "rows": rows,
        "scheme": options.scheme,
        "threads": options.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_end": os.getloadavg()[0],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build and run one model; figures of both."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle, picture = folder / "checkpoint", folder / "bundle", folder / "image.png"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, model)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    threads = ["--threads", str(options.threads)]
    build = ["build", "--model", model, "--weights", str(checkpoint), "--scheme", options.scheme]
    built = in_child([*build, "--no-compare", "--offline", "--out", str(bundle), *threads])
    tokens = ["--max-new-tokens", str(options.tokens)]
    ran = in_child(["run", str(bundle), str(picture), "--json", *tokens, *threads])
    said = json.loads(ran.pop("stdout"))["results"][0]
    count = max(1, len(said["tokens"]))
    rest = said["seconds"]["total"] - said["seconds"]["first_token"]
    half = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    onnx = sum(p.stat().st_size for p in (bundle / "model/onnx").iterdir())
    return {
        "model": model,
        "float16_bytes": half,
        "onnx_bytes": onnx,
        "ratio": onnx / half,
        "build_seconds": built["seconds"],
        "build_cpu_seconds": built["cpu_seconds"],
        "build_peak_rss": built["peak_rss"],
        "run_peak_rss": ran["peak_rss"],
        "run_seconds": ran["seconds"],
        "prompt_tokens": said["prompt_tokens"],
        "first_token_seconds": said["seconds"]["first_token"],
        "tokens": count,
        "seconds_per_token": rest / max(1, count - 1),
    }


def in_child(arguments: list[str]) -> dict[str, Any]:
    """Run one command line of medexport in a process whose children's memory is its own alone."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def child(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "exporter", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_rss": 1024 * used.ru_maxrss,
        "stdout": done.stdout,
    }
    print(json.dumps(figures))


def print_row(row: dict[str, Any], *, header: bool) -> None:
    if header:
        print(
            f"{'model':22} {'fp16 GB':>8} {'onnx GB':>8} {'ratio':>6} {'build s':>8} {'cpu s':>7} "
            f"{'peak GB':>8} {'run GB':>7} {'prompt':>7} {'first s':>8} {'s/token':>8}"
        )
    print(
        f"{row['model']:22} {row['float16_bytes'] / 1e9:8.2f} {row['onnx_bytes'] / 1e9:8.2f} "
        f"{row['ratio']:6.3f} {row['build_seconds']:8.1f} {row['build_cpu_seconds']:7.1f} "
        f"{row['build_peak_rss'] / 1e9:8.2f} {row['run_peak_rss'] / 1e9:7.2f} "
        f"{row['prompt_tokens']:7} {row['first_token_seconds']:8.2f} {row['seconds_per_token']:8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
