"""Predicted against measured peak memory of captioning on this machine's CPU.

    python benchmarks/fit.py [--models demo,smolvlm-256m,smolvlm-500m] [--schemes fp16,int8,int4-rtn]
                             [--threads 1] [--tower-runs 2] [--steps 8] [--folder DIR]
                             [--out docs/fit.json]

Random weights of the published shape (the demo model has its own) are quantized and exported, then
one image at the model's image limit is captioned in a process of its own with the deployed runtime:
all tiles' pixels, a prompt of full length, buffers for `max_new_tokens` tokens, `--steps` of them
written. Peak memory is the
kernel's high-water mark (VmHWM) of that process. The tower runs on `--tower-runs` tiles only and
its rows are reused, since one tile takes the memory that each takes. Seconds are of a machine that
may be busy and are for orientation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from exporter.families.shapes.parts import ModelShape

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo,smolvlm-256m,smolvlm-500m")
    parser.add_argument("--schemes", default="fp16,int8,int4-rtn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tower-runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="tokens written; memory is the same")
    parser.add_argument("--folder", type=Path, help="keep the artifacts here and reuse them")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--caption", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        model, scheme, folder = options.export
        export(model, scheme, Path(folder), options.threads)
    elif options.caption:
        model, folder = options.caption
        print(json.dumps(caption(model, Path(folder), options)))
    elif options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        report(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="fit-") as folder:
            report(options, Path(folder))


def report(options: argparse.Namespace, folder: Path) -> None:
    """Measure each model in each scheme, print a table and write the JSON."""
    rows = []
    for model in options.models.split(","):
        for scheme in options.schemes.split(","):
            place = folder / f"{model}-{scheme}"
            if not (place / "exported/model/onnx").is_dir():
                child(["--export", model, scheme, str(place)], options)
            measured = json.loads(child(["--caption", model, str(place)], options))
            rows.append({"model": model, "scheme": scheme, **measured})
            print(line(rows[-1], predicted(model, scheme)), flush=True)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "tower_runs": options.tower_runs,
        "load_average_at_end": os.getloadavg()[0],
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def line(row: dict[str, Any], guess: int) -> str:
    """One row of the table: megabytes and the prediction's error."""
    peak = row["peak_rss"]
    stages = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in row["high_water"].items())
    return (
        f"{row['model']:14} {row['scheme']:10} predicted {guess / 1e6:7.0f} MB  measured "
        f"{peak / 1e6:7.0f} MB  {(guess - peak) / peak:+.1%}   [{stages}]"
    )


def child(arguments: list[str], options: argparse.Namespace) -> str:
    """Run this script in a process of its own; its last line of output."""
    command = [sys.executable, __file__, *arguments, "--threads", str(options.threads)]
    command += ["--tower-runs", str(options.tower_runs), "--steps", str(options.steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().rpartition("\n")[2]


def predicted(model: str, scheme: str) -> int:
    """The plan's sum for this machine, in bytes."""
    from exporter.catalog.profiles import find_model
    from exporter.families.shapes.find import shape_of
    from exporter.pipeline.fit import predict
    from exporter.pipeline.targets import choose_target
    from exporter.quantizers.schemes import find_scheme

    profile = find_model(model)
    return predict(profile, shape_of(profile), find_scheme(scheme), choose_target("auto")).needed


def export(model: str, scheme: str, out: Path, threads: int) -> None:
    """Checkpoint, quantized folder and graphs of `model` under `out`."""
    from exporter.catalog.profiles import find_model
    from exporter.core.data import data_root
    from exporter.families.shapes.find import shape_of
    from exporter.graphs.export import export_model
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme

    profile, chosen = find_model(model), find_scheme(scheme)
    out.mkdir(parents=True, exist_ok=True)
    if profile.builtin:
        source = data_root("profiles") / profile.builtin.model
    else:
        source = out.parent / f"{model}-checkpoint"
        if not source.is_dir():
            write_checkpoint(model, source)
    if chosen.quantizes:
        (out / "quantized").mkdir()
        quantize_model(source, out / "quantized", chosen, threads=threads)
        source = out / "quantized"
    if not profile.builtin:
        write_tokenizer(shape_of(profile), out / "tokenizer.json")
    (out / "exported").mkdir()
    export_model(source, out / "exported")


def write_tokenizer(shape: ModelShape, path: Path) -> None:
    """A byte-pair tokenizer with as many entries as the model has, of random merges."""
    import random

    from tokenizers import Tokenizer, models

    size = next(w.rows for w in shape.weights if w.role == "embedding")
    words, merges, choose = [chr(c) for c in range(33, 127)], [], random.Random(0)
    known = set(words)
    while len(words) < size:
        first, second = choose.choice(words), choose.choice(words)
        if len(first + second) < 12 and first + second not in known:
            known.add(first + second)
            words.append(first + second)
            merges.append((first, second))
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).save(str(path))


def write_checkpoint(model: str, folder: Path) -> None:
    """Tensors of the published shapes with random values, and a config.json of the facts."""
    from exporter.catalog.profiles import find_model
    from exporter.catalog.shapes import known_config, tensor_table
    from exporter.core.tensors import SafetensorsWriter

    folder.mkdir()
    profile = find_model(model)
    config: dict[str, Any] = {"model_type": profile.facts.model_type}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes, rng = tensor_table(profile), np.random.default_rng(0)
    with SafetensorsWriter(
        folder / "model.safetensors", {n: ("F16", s) for n, s in shapes.items()}
    ) as writer:
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            if "norm" in name and name.endswith("weight"):
                values += 1
            writer.write(name, values.astype(np.float16))


@dataclass(frozen=True)
class Markers:
    """What the runtime asks of a preparer: where image rows go."""

    image_token_id: int


def caption(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of one caption in this process."""
    from exporter.catalog.profiles import find_model
    from exporter.families.base import PromptInputs
    from exporter.families.shapes.find import shape_of
    from exporter.pipeline.fit import workload
    from exporter.runtimes.ort import OrtEngine

    held = hold_small_parts(folder / "tokenizer.json")
    profile = find_model(model)
    shape, high = shape_of(profile), {"imports": high_water()}
    load, tower = workload(shape, profile.max_new_tokens, None, 1), shape.tower
    assert tower is not None
    image_token = int(str(profile.facts.config.get("image_token_id") or 0))
    clock = [perf_counter()]
    engine = OrtEngine(
        folder / "exported/model/onnx",
        Markers(image_token),  # type: ignore[arg-type]
        options.threads,
    )
    clock.append(perf_counter())
    high["load"] = high_water()
    rng = np.random.default_rng(0)
    size = (1, 1, 3, tower.side, tower.side)
    runs = tuple({"pixel_values": rng.random(size, np.float32)} for _ in range(tower.tiles))
    some = runs[: options.tower_runs]
    rows = engine.features(PromptInputs(np.zeros(1, np.int64), some))
    features = np.concatenate([rows[: len(rows) // len(some)]] * tower.tiles)
    clock.append(perf_counter())
    high["vision"] = high_water()
    ids = np.full(load.prompt, image_token + 1 if image_token < 9 else 5, np.int64)
    ids[: len(features)] = image_token
    token = int(engine.prefill(PromptInputs(ids, runs), features, load.context).argmax())
    clock.append(perf_counter())
    high["prefill"] = high_water()
    for _ in range(options.steps):
        token = int(engine.step(token).argmax())
    clock.append(perf_counter())
    high["decode"] = high_water()
    seconds = dict(zip(("load", "vision", "prefill", "decode"), np.diff(clock), strict=True))
    return {
        "peak_rss": high["decode"],
        "high_water": high,
        "seconds": {k: round(float(v), 3) for k, v in seconds.items()},
        "tower_runs": len(some),
        "steps": options.steps,
        "prompt": load.prompt,
        "tiles": tower.tiles,
        "small_parts": len(held),
    }


def hold_small_parts(tokenizer: Path) -> list[object]:
    """Template, image settings and a tokenizer of the model's size, as a captioner holds them."""
    from PIL import Image
    from tokenizers import Tokenizer

    from exporter.core.data import data_root
    from exporter.core.modelfiles import read_config
    from exporter.families.table import family_of

    demo = data_root("profiles") / "demo/model"
    preparer = family_of(read_config(demo / "config.json")).open_preparer(demo)
    preparer.prepare([Image.new("RGB", (64, 64))], "Describe the image.")
    held: list[object] = [preparer]
    if tokenizer.is_file():
        held.append(Tokenizer.from_file(str(tokenizer)))
    return held


def high_water() -> int:
    """Peak resident bytes of this process so far (Linux)."""
    text = STATUS.read_text(encoding="ascii")
    found = next(row for row in text.splitlines() if row.startswith("VmHWM"))
    return 1024 * int(found.split()[1])


if __name__ == "__main__":
    main()
