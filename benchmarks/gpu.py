"""Models on a GPU: memory, latency, tokens a second and the share of the memory's bandwidth.

    python benchmarks/gpu.py [--models smolvlm-500m,llava-1.5-7b] [--runtimes torch,bitsandbytes,
                             onnxruntime,tensorrt] [--precisions fp16,int8,nf4,int4] [--steps 64]
                             [--rounds 5] [--folder DIR] [--minutes 25] [--out gpu.json]
    python benchmarks/gpu.py --device cpu --tiny        a smoke run: the demo models, no GPU

Runs alone on a GPU machine with whatever of torch, bitsandbytes, onnxruntime-gpu and tensorrt is
installed, and writes one JSON file; what could not be measured is in it with the reason. Weights are
random and of the published shape: time and memory do not depend on them. One image at the model's
image limit, an instruction and `--steps` tokens, each runtime and precision in a process of its own,
one after another. The file is written anew after each, so that a run that is cut short keeps what
it has; `--minutes` begins nothing new when that much time is gone. The exit code is 0 when anything
was measured, and 5 (as of a command whose machine lacks something) when nothing was.

The share of the roofline is the bytes that one token must read (weights of the decoder and the head
as stored, keys and values of a full context) times tokens a second, over the bandwidth of the GPU's
profile (`medexport targets`) or `--bandwidth`.
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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SCHEMA = 1
LACKING = 5  # exit code of `EnvironmentLacks`
# Precision by runtime: the scheme of the catalog whose bytes are counted, and where weights come from.
SCHEMES = {
    "torch": {"fp16": "fp16"},
    "bitsandbytes": {"int8": "bnb-int8", "nf4": "bnb-nf4"},
    "onnxruntime": {"fp16": "fp16", "int8": "int8", "nf4": "bnb-nf4", "int4": "int4-rtn"},
    "tensorrt": {"fp16": "fp16", "int8": "int8", "int4": "int4-rtn-pos"},
}
NEEDS = {
    "torch": ("torch", "transformers"),
    "bitsandbytes": ("bitsandbytes", "torch", "transformers"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "tensorrt": ("tensorrt", "onnx"),
}
PACKAGES = (
    "torch", "transformers", "bitsandbytes", "onnxruntime-gpu", "onnxruntime", "onnx", "tensorrt",
    "nvidia-ml-py", "numpy",
)  # fmt: skip
HEADER = (
    "model", "runtime", "precision", "GPU MB", "RSS MB", "vision ms", "TTFT ms", "tok/s", "roofline",
    "J/token",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement."""

    model: str
    runtime: str
    precision: str
    scheme: str


def main() -> int:
    """Returns the exit code."""
    options = _parsed()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        measured = report(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            measured = report(options, Path(folder))
    return 0 if measured else LACKING


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the demo models, few steps")
    parser.add_argument("--models", default="")
    parser.add_argument("--runtimes", default=",".join(SCHEMES))
    parser.add_argument("--precisions", default="fp16,int8,nf4,int4")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the host")
    parser.add_argument("--minutes", type=float, default=0, help="0: no limit")
    parser.add_argument("--bandwidth", type=float, help="GB/s, where no profile names the GPU")
    parser.add_argument("--folder", type=Path, help="keep checkpoints here and reuse them")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    options.models = options.models or (
        "demo,demo-llava" if options.tiny else "smolvlm-500m,llava-1.5-7b"
    )
    if options.tiny:
        options.steps, options.rounds = 4, 2
    return options


def report(options: argparse.Namespace, folder: Path) -> int:
    """Measure each case, print a row for it and write the file; returns how many were measured."""
    result = surroundings(options)
    rows: list[dict[str, Any]] = result["rows"]
    begun = monotonic()
    print("  ".join(h.rjust(w) for h, w in zip(HEADER, widths(), strict=True)), flush=True)
    for case in cases(options):
        late = options.minutes and monotonic() - begun > 60 * options.minutes
        found = {"skipped": f"not begun: {options.minutes} minutes were gone"} if late else None
        row = {**case.__dict__, **(found or one(case, folder, options))}
        if "tokens_per_s" in row:
            row["roofline"] = roofline(case, row, result["bandwidth_gbs"])
        rows.append(row)
        print(line(row), flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    measured = sum("skipped" not in row for row in rows)
    print(f"{measured} measured, {len(rows) - measured} skipped: {options.out}")
    if not measured:
        first = next(
            (row["skipped"] for row in rows), "no model, runtime and precision was asked for"
        )
        print(f"nothing was measured; the first reason: {first}")
    return measured


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All that was asked for and exists."""
    precisions = options.precisions.split(",")
    for model in options.models.split(","):
        for runtime in options.runtimes.split(","):
            for precision, scheme in SCHEMES[runtime].items():
                if precision in precisions:
                    yield Case(model, runtime, precision, scheme)


def surroundings(options: argparse.Namespace) -> dict[str, Any]:
    """The file without its rows: when, on what, with what."""
    from exporter.compare.gpu import board
    from exporter.pipeline.machine import find_gpu, gpu_target
    from exporter.pipeline.targets import choose_target

    gpu = find_gpu()
    cuda = options.device == "cuda"
    target = (gpu_target(gpu) if gpu else None) if cuda else choose_target("auto")
    known = target.bandwidth_gbs.value if target and target.bandwidth_gbs else None
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "gpu": gpu.__dict__ if gpu else None,
        "driver": board() if cuda else None,
        "target": target.name if target else None,
        "bandwidth_gbs": options.bandwidth or known,
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "rows": [],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def one(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare and measure one case; the reason under "skipped" where that cannot be."""
    missing = [m for m in NEEDS[case.runtime] if find_spec(m) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    if case.runtime == "tensorrt" and (why := _no_engine(options)):
        return {"skipped": why}
    place = folder / f"{case.model}-{case.runtime}-{case.precision}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        made = child("prepare", case, place, options)
        if "skipped" in made:
            return made
        return {"prepare_s": made["seconds"], **child("measure", case, place, options)}
    finally:
        # Two of the large ones may not fit on the disk.
        shutil.rmtree(place, ignore_errors=True)


def _no_engine(options: argparse.Namespace) -> str:
    """Why no engine can be measured; empty where one can."""
    return "TensorRT runs on a GPU only" if options.device == "cpu" else ""


def child(command: str, case: Case, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the worker in a process of its own; its last lines are the reason when it fails."""
    arguments = [sys.executable, str(Path(__file__).with_name("gpu_worker.py")), command]
    arguments += [case.model, case.runtime, case.scheme, str(place), "--device", options.device]
    for name in ("threads", "steps", "rounds"):
        arguments += [f"--{name}", str(getattr(options, name))]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited]),
        "OMP_NUM_THREADS": str(options.threads),
    }
    done = subprocess.run(arguments, env=environment, check=False, capture_output=True, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    if last.startswith("{"):
        found: dict[str, Any] = json.loads(last)
        return found
    lines = (done.stderr or done.stdout).strip().splitlines()
    return {"skipped": f"{command} failed with code {done.returncode}: {' | '.join(lines[-3:])}"}


def roofline(case: Case, row: dict[str, Any], bandwidth: float | None) -> dict[str, Any] | None:
    """Bytes that a token reads, tokens a second at full bandwidth, and the share reached."""
    from exporter.catalog.profiles import find_model
    from exporter.families.shapes.find import shape_of
    from exporter.pipeline.fit_sizes import token_bytes
    from exporter.quantizers.schemes import find_scheme

    if bandwidth is None:
        return None
    shape = shape_of(find_model(case.model))
    assert shape.decoder is not None
    item = 2 if row["gpu"] else 4
    read = token_bytes(shape, find_scheme(case.scheme))
    read += shape.decoder.read_values(row["context"]) * item
    return {
        "token_bytes": read,
        "limit_tokens_per_s": bandwidth * 1e9 / read,
        "share": row["tokens_per_s"] * read / (bandwidth * 1e9),
    }


def widths() -> list[int]:
    return [14, 12, 9, 8, 8, 9, 9, 8, 8, 8]


def line(row: dict[str, Any]) -> str:
    """One row of the table, or why there is none."""
    names = [row["model"], row["runtime"], row["precision"]]
    if "skipped" in row:
        cells = names
        tail = f"  skipped: {row['skipped'][:110]}"
    else:
        use = row["gpu"]
        held = use.get("process") or use.get("device")
        limit = row["roofline"]
        cells = [
            *names,
            *(f"{v / 1e6:.0f}" if v else "-" for v in (held, row["peak_rss"])),
            *(f"{row[k]:.1f}" for k in ("vision_ms", "first_token_ms", "tokens_per_s")),
            f"{limit['share']:.0%}" if limit else "-",
            f"{use['joules_per_token']:.2f}" if use.get("joules_per_token") else "-",
        ]
        tail = ""
    return "  ".join(c.rjust(w) for c, w in zip(cells, widths(), strict=False)) + tail


if __name__ == "__main__":
    sys.exit(main())
