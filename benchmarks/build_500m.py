"""Seconds and peak memory of a build of the full SmolVLM-500M shape, with random weights.

    python benchmarks/build_500m.py [--scheme int4-rtn] [--threads 2] [--tie] [--out result.json]

Writes a float16 checkpoint of the published shape (489 tensors, 1.0 GB) to a temporary folder, then
merges (a streaming copy: there is no adapter), quantizes, exports and packages it in one child
process, as a build does. Peak memory is the kernel's high-water mark of resident memory, cleared
before each stage. `--tie` makes the head's bytes those of the embedding. Nothing is captioned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shapes import config_of

from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import tensor_table
from exporter.core.digest import list_files
from exporter.core.tensors import SafetensorsWriter

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smolvlm-500m"
EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="int4-rtn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tie", action="store_true", help="head with the embedding's bytes")
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, reuse a checkpoint")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages:
        print(json.dumps(run_stages(options.folder, options.scheme, options.threads)))
    elif options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        report(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="build-500m-") as folder:
            report(options, Path(folder))


def report(options: argparse.Namespace, folder: Path) -> None:
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, tie=options.tie)
    command = [sys.executable, __file__, "--stages", "--folder", str(folder)]
    command += ["--scheme", options.scheme, "--threads", str(options.threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout) | {
        "scheme": options.scheme,
        "threads": options.threads,
        "shared_head": options.tie,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_end": os.getloadavg()[0],
        "numpy": np.__version__,
    }
    print_table(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_table(result: dict[str, Any]) -> None:
    print(f"{'stage':10} {'seconds':>8} {'cpu s':>8} {'peak MB':>8} {'bytes':>14}")
    for row in result["stages"]:
        peak, size = row["peak_rss"] / 1e6, row["bytes"]
        print(
            f"{row['stage']:10} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} {peak:8.0f} {size:14,}"
        )
    peak = max(row["peak_rss"] for row in result["stages"])
    busy = sum(row["cpu_seconds"] for row in result["stages"])
    print(f"{'build':10} {result['seconds']:8.2f} {busy:8.2f} {peak / 1e6:8.0f}")
    for name in ("quantized_ratio", "artifact_ratio"):
        if name in result:
            print(f"{name.replace('_', ' ')} to the float16 weights: {result[name]:.4f}")


def write_checkpoint(folder: Path, *, tie: bool) -> None:
    """Write the published tensors with random values (norms around 1) and a config.json."""
    folder.mkdir()
    profile = find_model(MODEL)
    shapes = tensor_table(profile)
    with SafetensorsWriter(
        folder / "model.safetensors", {n: ("F16", s) for n, s in shapes.items()}
    ) as writer:
        for name, shape in shapes.items():
            source = EMBEDDING if tie and name == HEAD else name
            seed = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little")
            values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
            values *= np.float32(0.02)
            if "norm" in name and name.endswith("weight"):
                values += 1
            writer.write(name, values.astype(np.float16))
    (folder / "config.json").write_text(json.dumps(config_of(MODEL), indent=2), encoding="utf-8")


def run_stages(folder: Path, scheme: str, threads: int) -> dict[str, Any]:
    """All stages in this process; figures of each."""
    # Imported here, after the start of the measured process, as the command line does.
    from exporter.adapters.merge import merge_adapters
    from exporter.graphs.export import export_model
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme

    chosen = find_scheme(scheme)
    stages: list[tuple[str, Callable[[Path, Path], object]]] = [
        ("merge", lambda source, out: merge_adapters(source, [], out)),
        ("quantize", lambda source, out: quantize_model(source, out, chosen, threads=threads)),
        ("export", export_model),
        ("package", package_model),
    ]
    if not chosen.quantizes:
        del stages[1]
    source, rows, start = folder / "checkpoint", [], time.perf_counter()
    for name, stage in stages:
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        row = measured(lambda s=source, o=out, run=stage: run(s, o))
        rows.append({"stage": name, "bytes": folder_bytes(out), **row})
        source = out
    seconds = time.perf_counter() - start
    half = (folder / "checkpoint/model.safetensors").stat().st_size
    result: dict[str, Any] = {"stages": rows, "seconds": seconds, "float16_bytes": half}
    if chosen.quantizes:
        result["quantized_ratio"] = (folder / "quantize/model.safetensors").stat().st_size / half
    result["artifact_ratio"] = folder_bytes(folder / "export/model/onnx") / half
    return result


def package_model(exported: Path, out: Path) -> None:
    """The bundle without reports, unsigned."""
    from exporter.bundle.manifest import Lineage, Source, Usage
    from exporter.bundle.package import BundleParts, package

    package(
        out,
        BundleParts(
            name="benchmark",
            exported=exported,
            scheme="benchmark",
            target="cpu",
            usage=Usage(
                family="idefics3", prompt="Describe this medical image.", max_new_tokens=64
            ),
            lineage=Lineage(base=Source(name="random weights", sha256="0" * 64)),
            tools={},
            checks={},
            statement="random weights",
        ),
    )


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Wall and processor seconds and peak resident bytes of `action` in this process (Linux)."""
    CLEAR.write_text("5")
    start, busy = time.perf_counter(), time.process_time()
    action()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_seconds": busy, "peak_rss": 1024 * int(line.split()[1])}


def folder_bytes(folder: Path) -> int:
    return sum((folder / p).stat().st_size for p in list_files(folder))


if __name__ == "__main__":
    main()
