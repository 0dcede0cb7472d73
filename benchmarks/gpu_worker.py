"""What `benchmarks/gpu.py` runs in processes of their own: make a model's files, or measure one model.

    python benchmarks/gpu_worker.py prepare MODEL SCHEME FOLDER --device cuda
    python benchmarks/gpu_worker.py measure MODEL RUNTIME SCHEME FOLDER --device cuda

The last line of output is a JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapes import config_of, write_small_files

from exporter.catalog.profiles import find_model
from exporter.catalog.schema import ModelProfile
from exporter.core.data import data_root
from exporter.core.errors import MedexportError
from exporter.core.tensors import Checkpoint, SafetensorsWriter
from exporter.families.base import PromptInputs
from exporter.families.shapes.find import shape_of
from exporter.families.table import family_of
from exporter.quantizers.plan import LayerPlan, plan_model
from exporter.quantizers.run import QuantizationReport, QuantizedLayer, quantize_model
from exporter.quantizers.schemes import find_scheme

POOL = 1 << 24
CHECKPOINT, QUANTIZED, EXPORTED, ENGINES = "checkpoint", "quantized", "exported", "engines"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("prepare", "measure"))
    parser.add_argument("model")
    parser.add_argument("runtime", nargs="?", default="")
    parser.add_argument("scheme")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        if options.command == "prepare":
            found = prepare(options.model, options.runtime, options.scheme, options.folder, options)
        else:
            found = measure(options.model, options.runtime, options.scheme, options.folder, options)
    except MedexportError as error:
        print(json.dumps({"skipped": str(error)}))
        sys.exit(error.exit_code)
    print(json.dumps(found))


# Files: random weights of the published shapes, written as fast as the disk takes them.


class Pool:
    """Numbers drawn once; each tensor gets a run of them that begins where its name says."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        normal = (rng.standard_normal(POOL, np.float32) * np.float32(0.02)).astype(np.float16)
        # Twice, so that a run may begin anywhere.
        self._normal = np.tile(normal, 2)
        self._bytes = np.tile(rng.integers(0, 256, POOL, np.uint8), 2)

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The values of a stored tensor; scales are small and positive, norms near one."""
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "little")
        count = int(np.prod(shape, dtype=np.int64))
        source = self._bytes if dtype == "U8" else self._normal
        run = source[start : start + POOL]
        values = (run[:count] if count <= POOL else np.resize(run, count)).reshape(shape)
        if dtype == "U8":
            return values
        if dtype == "F32" or name.endswith(".scales"):
            values = np.abs(values) / 10
        elif "norm" in name and name.endswith("weight"):
            values = values + np.float16(1)
        return values.astype(np.float32 if dtype == "F32" else np.float16)


def prepare(
    model: str, runtime: str, scheme: str, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """What `runtime` needs of `model` in `folder`: checkpoint, packed weights, graphs."""
    profile, start = find_model(model), perf_counter()
    source = checkpoint_of(profile, folder.parent / f"{model}-{CHECKPOINT}")
    if runtime in ("onnxruntime", "tensorrt"):
        folder.mkdir(parents=True, exist_ok=True)
        export(profile, source, folder, runtime, scheme, options)
    return {"seconds": round(perf_counter() - start, 1)}


def checkpoint_of(profile: ModelProfile, folder: Path) -> Path:
    """The built-in checkpoint, or one with random weights, in `folder` in the layout of a merged one."""
    from exporter.adapters.merge import merge_adapters

    if folder.is_dir():
        return folder
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if profile.builtin:
        merge_adapters(data_root("profiles") / profile.builtin.model, [], work)
    else:
        write_random(profile, work)
    work.rename(folder)
    return folder


def write_random(profile: ModelProfile, work: Path) -> None:
    """The small files of the published facts, and tensors of the shapes that follow from them."""
    config, pool = config_of(profile.name), Pool()
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_small_files(work, profile.name, config)
    family = family_of(config)
    specs = [*family.decoder_spec(config).tensors(), *family.tower_spec(config).tensors()]
    entries = {spec.name: ("F16", spec.shape) for spec in specs}
    with SafetensorsWriter(work / "model.safetensors", entries) as writer:
        for name, (dtype, shape) in entries.items():
            writer.write(name, pool.take(name, dtype, shape))


def export(
    profile: ModelProfile,
    source: Path,
    folder: Path,
    runtime: str,
    scheme: str,
    options: argparse.Namespace,
) -> None:
    """Graphs of `source` in the scheme; those for onnxruntime on a GPU compute in float16."""
    from exporter.graphs.export import export_model
    from exporter.graphs.half import halve_export

    chosen, quantized, out = find_scheme(scheme), folder / QUANTIZED, folder / EXPORTED
    for made in (quantized, out):
        made.mkdir()
    if chosen.quantizes and profile.builtin:
        quantize_model(source, quantized, chosen, threads=options.threads)
    elif chosen.quantizes:
        write_packed(source, quantized, scheme)
    weights = quantized if chosen.quantizes else source
    if runtime == "tensorrt":
        from exporter.engines.build import build_engines

        export_model(weights, out, dialect="standard", compute="float16")
        build_engines(out / "model", out / "export.json", folder / ENGINES)
    else:
        # Level 0 is what the CUDA kernel does whatever is asked: float16 after unpacking.
        export_model(weights, out, accuracy_level=0 if options.device == "cuda" else 4)
        if options.device == "cuda":
            halve_export(out)
    shutil.rmtree(quantized)


def write_packed(source: Path, out: Path, scheme: str) -> None:
    """A quantized folder with random codes: the time of the kernels does not depend on them."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plan = plan_model(Checkpoint.open(source), config, find_scheme(scheme))
    entries = {name: entry for p in plan for name, entry in p.entries().items()}
    pool = Pool()
    with SafetensorsWriter(out / "model.safetensors", entries) as writer:
        for name, (dtype, shape) in entries.items():
            writer.write(name, pool.take(name, dtype, shape))
    shutil.copyfile(source / "config.json", out / "config.json")
    document = _report(scheme, plan).document()
    (out / "quantization.json").write_text(json.dumps(document), encoding="utf-8")


def _report(scheme: str, plan: tuple[LayerPlan, ...]) -> QuantizationReport:
    layers = tuple(QuantizedLayer(p, 0.0, {"random": True}) for p in plan if p.format)
    floats = tuple(p for p in plan if not p.format)
    return QuantizationReport(scheme, layers, floats, 0, sum(p.bytes for p in plan))


# Measuring.


@dataclass(frozen=True)
class Marker:
    """What an engine asks of a preparer: where image rows go."""

    image_token_id: int | None


def measure(
    model: str, runtime: str, scheme: str, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds, memory and energy of one model in this process; medians over the rounds."""
    from exporter.compare.gpu import GpuMeter
    from exporter.compare.memory import peak_rss

    profile = find_model(model)
    meter = GpuMeter() if options.device == "cuda" else None
    source = checkpoint_of(profile, folder.parent / f"{model}-{CHECKPOINT}")
    start = perf_counter()
    engine = OPENERS[runtime](profile, source, folder, scheme, options)
    loaded = perf_counter() - start
    inputs, capacity = synthetic_inputs(profile, engine, options.steps)
    _round(engine, inputs, capacity, min(4, options.steps))  # warm-up
    if meter:
        meter.begin()
    rounds = [_round(engine, inputs, capacity, options.steps) for _ in range(options.rounds)]
    vision, prefill = (median(r[i] for r in rounds) for i in (0, 1))
    token = median(t for r in rounds for t in r[2])
    use = meter.finish(options.rounds * options.steps) if meter else None
    return {
        "load_s": round(loaded, 2),
        "prompt": len(inputs.input_ids),
        "context": capacity,
        "vision_ms": 1000 * vision,
        "first_token_ms": 1000 * (vision + prefill),
        "token_ms": 1000 * token,
        "tokens_per_s": 1 / token,
        "peak_rss": peak_rss(),
        "gpu": {} if use is None else {f: getattr(use, f) for f in use.__struct_fields__},
    }


def _round(
    engine: Any, inputs: PromptInputs, capacity: int, steps: int
) -> tuple[float, float, list[float]]:
    """Seconds of the vision part, the prefill and each token; tokens are given, not chosen."""
    clock = [perf_counter()]
    features = engine.features(inputs)
    clock.append(perf_counter())
    engine.prefill(inputs, features, capacity)
    clock.append(perf_counter())
    for step in range(steps):
        engine.step(5 + step % 50)
        clock.append(perf_counter())
    vision, prefill, *tokens = np.diff(clock).tolist()
    return vision, prefill, tokens


def synthetic_inputs(profile: ModelProfile, engine: Any, steps: int) -> tuple[PromptInputs, int]:
    """One image at the model's image limit and an instruction, and the places of the whole text.

    For models whose image stands in the prompt and whose tower takes tiles of one size.
    """
    from exporter.pipeline.fit import workload

    shape = shape_of(profile)
    tower = shape.tower
    if tower is None or shape.decoder is None:
        raise ValueError(f"{profile.name} is no captioner")
    prompt, rng = workload(shape, steps, None, 1).prompt, np.random.default_rng(0)
    size = (1, 1, 3, tower.side, tower.side)
    runs = tuple({"pixel_values": rng.random(size, np.float32)} for _ in range(tower.tiles))
    image = image_token(profile)
    ids = np.full(prompt, image + 1 if image < 9 else 5, np.int64)
    rows = len(engine.features(PromptInputs(np.zeros(1, np.int64), runs)))
    ids[:rows] = image
    return PromptInputs(ids, runs), prompt + steps


def image_token(profile: ModelProfile) -> int:
    """Id of the token that stands for an image's rows."""
    facts = profile.facts.config
    return int(str(facts.get("image_token_id") or facts.get("image_token_index") or 0))


def open_torch(
    profile: ModelProfile, source: Path, _folder: Path, scheme: str, options: argparse.Namespace
) -> Any:
    """The torch model in float16 (float32 on a CPU)."""
    import torch

    from exporter.runtimes.torch_device import Place
    from exporter.runtimes.torch_reference import TorchEngine, load_model

    torch.set_num_threads(options.threads)
    place = Place(options.device, "float16" if options.device == "cuda" else "float32")
    place.require()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = load_model(source, config, place)
    if scheme != "fp16":
        bnb_linears(model, scheme)
    place.settle(model)
    marker: Any = Marker(image_token(profile))
    return TorchEngine(model, marker, family_of(config), place)


def bnb_linears(model: Any, scheme: str) -> None:
    """Give all linear layers but the head to bitsandbytes, which packs them on their way to the GPU."""
    import bitsandbytes as bnb
    from torch import nn

    head = model.get_output_embeddings()
    found = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    for name, old in found:
        parent, _, leaf = name.rpartition(".")
        shape, has_bias, weight = (
            (old.in_features, old.out_features),
            old.bias is not None,
            old.weight,
        )
        if scheme == "bnb-nf4":
            new = bnb.nn.Linear4bit(
                *shape, bias=has_bias, compute_dtype=weight.dtype, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        setattr(model.get_submodule(parent), leaf, new)


def open_ort(
    profile: ModelProfile, _source: Path, folder: Path, _scheme: str, options: argparse.Namespace
) -> Any:
    """The exported graphs."""
    from exporter.runtimes.ort import OrtEngine
    from exporter.runtimes.ort_cuda import device_setup

    marker: Any = Marker(image_token(profile))
    setup = device_setup(options.device)
    return OrtEngine(folder / EXPORTED / "model" / "onnx", marker, options.threads, setup)


def open_tensorrt(
    profile: ModelProfile, _source: Path, folder: Path, _scheme: str, _options: argparse.Namespace
) -> Any:
    """The engines."""
    from exporter.runtimes.trt import TrtEngine
    from exporter.runtimes.trt_api import load_tensorrt
    from exporter.runtimes.trt_driver import CudaDriver

    marker: Any = Marker(image_token(profile))
    return TrtEngine(folder / ENGINES, marker, load_tensorrt(), CudaDriver())


Opener = Callable[[ModelProfile, Path, Path, str, argparse.Namespace], Any]
OPENERS: dict[str, Opener] = {
    "torch": open_torch,
    "bitsandbytes": open_torch,
    "onnxruntime": open_ort,
    "tensorrt": open_tensorrt,
}

if __name__ == "__main__":
    main()
