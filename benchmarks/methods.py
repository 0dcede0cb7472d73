"""Output error of quantization methods on the same matrices and inputs: ours and onnxruntime's.

    python benchmarks/methods.py [--model FOLDER] [--cases 64] [--layers 2] [--blocks 32 64 128]
        [--symmetric 0 1] [--rows 4096] [--skip PREFIX ...] [--threads 2] [--out methods.json]

What is measured: ``tr(dW H dW^T) / tr(W H W^T)``, the relative squared error of a layer's output, H
the second moment of its inputs, averaged over the matrices; once for the calibration inputs and once
for inputs that calibration did not see. Without `--model` the matrices have SmolVLM-500M's shapes,
heavy-tailed weights and correlated inputs with a few large channels; with it they are those of the
model's decoder blocks, the inputs those of the float model on the phantom sets.

Onnxruntime's quantizers get each matrix as a model of one MatMul; what they stored is read back by
multiplying it with the identity in float32. Bytes count float scales and zero points as float16.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.quantizers.awq import awq_scales, clip_matrix, fold_pairs, scaled_statistics
from exporter.quantizers.gptq import GptqSettings, gptq_matrix
from exporter.quantizers.hessian import output_error
from exporter.quantizers.hqq import hqq_matrix
from exporter.quantizers.rtn import quantize_matrix

Array = NDArray[np.float32]
# SmolVLM-500M: hidden 960, 5 key-value heads of 64, intermediate 2560.
SHAPES = {"q": (960, 960), "k": (320, 960), "gate": (2560, 960), "down": (960, 2560)}


@dataclass(frozen=True)
class Readers:
    """Matrices that read the same inputs; `shared` and `width` as in awq.FoldPair."""

    name: str
    weights: tuple[Array, ...]
    seen: InputStatistics
    unseen: Array
    shared: int = 1
    width: int = 0


@dataclass(frozen=True)
class Result:
    """What a method makes of one matrix: dequantized weights and stored bytes."""

    values: Array
    nbytes: int


Quantizer = Callable[[Readers, BlockFormat], list[Result]]


def synthetic(rows: int) -> list[Readers]:
    """Matrices of SmolVLM-500M's shapes; inputs of a spectrum like that of hidden states."""
    rng = np.random.default_rng(7)
    found = []
    for name, (n, k) in SHAPES.items():
        mix = (rng.standard_normal((k, k)) * np.arange(1, k + 1) ** -0.6).astype(np.float32)
        gains = np.exp(rng.normal(0, 0.6, k))
        gains[rng.integers(0, k, 4)] *= 15
        x = (rng.standard_normal((2 * rows, k)).astype(np.float32) @ mix.T) * gains
        x = (x / x.std()).astype(np.float32)
        w = (0.03 * rng.standard_t(6, (n, k))).astype(np.float32)
        seen, unseen = x[:rows], x[rows:]
        moments = [(a.T @ a / rows).astype(np.float32) for a in (seen, unseen)]
        stats = InputStatistics(moments[0], np.abs(seen).mean(0), seen[:512].copy(), rows)
        found.append(Readers(name, (w,), stats, moments[1]))
    return found


class _Recorder:
    """A `BlockVisitor` that keeps weights and statistics and changes nothing."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.blocks: list[tuple[dict[str, Array], dict[str, InputStatistics]]] = []

    def __call__(
        self, layer: int, weights: Mapping[str, Array], inputs: Mapping[str, InputStatistics]
    ) -> Mapping[str, Array]:
        if layer < self.layers:
            self.blocks.append(({n: w.copy() for n, w in weights.items()}, dict(inputs)))
        return {}


def of_model(model: Path, cases: int, layers: int, threads: int, work: Path) -> list[Readers]:
    """The decoder's matrices with the statistics of two phantom sets."""
    from exporter.calibrate.prompts import embed_prompts
    from exporter.calibrate.sets import open_set
    from exporter.calibrate.walk import walk_decoder
    from exporter.core.cases import Case
    from exporter.core.modelfiles import read_config
    from exporter.core.tensors import Checkpoint
    from exporter.families.table import family_of
    from exporter.graphs.export import export_model

    config = read_config(model / "config.json")
    spec, checkpoint = family_of(config).decoder_spec(config), Checkpoint.open(model)
    (work / "exported").mkdir(parents=True)
    export_model(model, work / "exported")
    recorded = []
    for name in ("phantoms-calib", "phantoms-eval"):
        images = open_set(name)
        samples = [
            Case(s.id, s.image_path, s.patient, s.modality, s.caption)
            for s in images.samples[:: max(1, len(images.samples) // cases)][:cases]
        ]
        exported = work / "exported" / "model"
        prompts = embed_prompts(model, exported, samples, images.prompt, threads=threads)
        recorder = _Recorder(layers)
        walk_decoder(checkpoint, spec, prompts, recorder, threads=threads)
        recorded.append(recorder.blocks)
    found = []
    for layer, ((weights, seen), (_, unseen)) in enumerate(zip(*recorded, strict=True)):
        for pair in fold_pairs(spec, layer):
            first = pair.readers[0]
            matrices = tuple(weights[n] for n in pair.readers)
            moment = unseen[first].second_moment
            found.append(Readers(first, matrices, seen[first], moment, pair.shared, pair.width))
    return found


def packed_result(packed: PackedMatrix, scales: Array | None = None) -> Result:
    """The float matrix that a packed one stands for, `scales` divided out."""
    values = dequantize(packed)
    return Result(values if scales is None else values / scales, packed.nbytes)


def each(function: Callable[[Array, BlockFormat, InputStatistics], PackedMatrix]) -> Quantizer:
    """A method that takes matrices one by one."""
    return lambda r, fmt: [packed_result(function(w, fmt, r.seen)) for w in r.weights]


def scaled(function: Callable[[Array, BlockFormat, InputStatistics], PackedMatrix]) -> Quantizer:
    """A method after AWQ's scales."""

    def quantize(r: Readers, fmt: BlockFormat) -> list[Result]:
        found = awq_scales(r.weights, fmt, r.seen, shared=r.shared, width=r.width).scales
        stats = scaled_statistics(r.seen, found)
        return [packed_result(function(w * found, fmt, stats), found) for w in r.weights]

    return quantize


def gptq(**options: Any) -> Callable[[Array, BlockFormat, InputStatistics], PackedMatrix]:
    """GPTQ with these settings."""
    return lambda w, fmt, s: gptq_matrix(w, fmt, s, GptqSettings(**options)).packed


OURS: dict[str, Quantizer] = {
    "rtn": each(lambda w, fmt, _: quantize_matrix(w, fmt, search=False)),
    "rtn-mse": each(lambda w, fmt, _: quantize_matrix(w, fmt, search=True)),
    "hqq": each(lambda w, fmt, _: hqq_matrix(w, fmt)),
    "clip by outputs": each(clip_matrix),
    "awq scales, rtn": scaled(lambda w, fmt, _: quantize_matrix(w, fmt, search=False)),
    "awq": scaled(clip_matrix),
    "gptq as published": each(gptq(order="none", clip="none", sweeps=0)),
    "gptq, order in blocks": each(gptq(order="within", clip="none", sweeps=0)),
    "gptq, order of blocks too": each(gptq(order="groups", clip="none", sweeps=0)),
    "gptq, + plain clip": each(gptq(clip="plain", sweeps=0)),
    "gptq, + Hessian clip": each(gptq(clip="hessian", sweeps=0)),
    "gptq, + factor clip": each(gptq(sweeps=0)),
    "gptq, + 1 sweep": each(gptq(sweeps=1)),
    "gptq, + 3 sweeps": each(gptq(sweeps=3)),
    "gptq, + 2 sweeps": each(gptq(sweeps=2)),
    "gptq, 2 sweeps, damping 0.003": each(gptq(sweeps=2, damping=0.003)),
    "gptq, 2 sweeps, damping 0.1": each(gptq(sweeps=2, damping=0.1)),
    "awq+gptq": scaled(gptq(sweeps=2)),
}


def onnxruntime_quantizer(kind: str) -> Quantizer:
    """One of onnxruntime's own: Default, HQQ, k_quant, GPTQ."""
    return lambda r, fmt: [onnxruntime_matrix(kind, w, fmt, r.seen) for w in r.weights]


def onnxruntime_matrix(
    kind: str, w: Array, fmt: BlockFormat, stats: InputStatistics | None = None
) -> Result:
    """One matrix ``[N, K]`` by onnxruntime's quantizer; `stats` for the kinds that calibrate."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as peer

    size = {"block_size": fmt.block, "is_symmetric": fmt.symmetric}
    if kind == "Default":
        config = peer.DefaultWeightOnlyQuantConfig(**size)
    elif kind == "HQQ":
        config = peer.HQQWeightOnlyQuantConfig(block_size=fmt.block)
    elif kind == "k_quant":
        config = peer.KQuantWeightOnlyQuantConfig()
    else:
        if stats is None:
            raise ValueError(f"{kind} needs inputs")
        config = peer.GPTQWeightOnlyQuantConfig(_Reader(stats), mse=kind == "GPTQ mse")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, w.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, w.shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    quantizer = peer.MatMulNBitsQuantizer(model, **size, algo_config=config)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bar
        quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    stored = [numpy_helper.to_array(t) for t in made.graph.initializer]
    nbytes = sum(a.size * 2 if a.dtype.kind == "f" else a.nbytes for a in stored)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
    values = session.run(None, {"x": np.eye(w.shape[1], dtype=np.float32)})[0]
    return Result(np.ascontiguousarray(values.T), nbytes)


class _Reader:
    """A calibration data reader whose inputs have exactly the second moment of `stats`."""

    def __init__(self, stats: InputStatistics) -> None:
        moment = stats.second_moment.astype("f8")
        moment.flat[:: len(moment) + 1] += 1e-6 * moment.diagonal().mean()
        self._x = np.linalg.cholesky(moment).T.astype(np.float32)

    def __iter__(self) -> Any:
        return iter([{"x": self._x}])


PEERS: dict[str, Quantizer] = {
    f"onnxruntime {kind}": onnxruntime_quantizer(kind)
    for kind in ("Default", "HQQ", "k_quant", "GPTQ", "GPTQ mse")
}
ASYMMETRIC_ONLY = ("onnxruntime HQQ", "onnxruntime k_quant")


@dataclass(frozen=True)
class Row:
    """A line of the table: errors relative to the output, bits per weight, seconds over all."""

    method: str
    block: int
    symmetric: bool
    bytes: int
    bits: float
    seen: float
    unseen: float
    seconds: float


def measure(name: str, method: Quantizer, fmt: BlockFormat, sets: Sequence[Readers]) -> Row:
    """One method in one format over all matrices."""
    start, seen, unseen, nbytes, weights = time.perf_counter(), [], [], 0, 0
    for readers in sets:
        results = method(readers, fmt)
        for w, result in zip(readers.weights, results, strict=True):
            change = result.values - w
            for found, moment in ((seen, readers.seen.second_moment), (unseen, readers.unseen)):
                found.append(output_error(change, moment) / output_error(w, moment))
            nbytes, weights = nbytes + result.nbytes, weights + w.size
    seconds = time.perf_counter() - start
    means = float(np.mean(seen)), float(np.mean(unseen))
    return Row(name, fmt.block, fmt.symmetric, nbytes, 8 * nbytes / weights, *means, seconds)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--symmetric", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("methods-work"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    if args.model:
        sets = of_model(args.model, args.cases, args.layers, args.threads, args.work)
    else:
        sets = synthetic(args.rows)
    chosen = {n: m for n, m in (PEERS | OURS).items() if not n.startswith(tuple(args.skip))}
    rows: list[Row] = []
    print(
        f"{'method':31} {'block':>5} {'sym':>3} {'bytes':>10} {'bits':>5} {'seen':>9} {'unseen':>9} {'s':>6}"
    )
    for block in args.blocks:
        for symmetric in args.symmetric:
            fmt = BlockFormat(4, block, bool(symmetric))
            for name, method in chosen.items():
                if symmetric and name in ASYMMETRIC_ONLY:
                    continue
                row = measure(name, method, fmt, sets)
                rows.append(row)
                sign = "yes" if symmetric else "no"
                print(
                    f"{name:31} {block:5} {sign:>3} {row.bytes:10} {row.bits:5.2f} "
                    f"{row.seen:9.2e} {row.unseen:9.2e} {row.seconds:6.1f}",
                    flush=True,
                )
    if args.out:
        matrices = [(r.name, [list(w.shape) for w in r.weights]) for r in sets]
        document = {"matrices": matrices, "rows": [asdict(r) for r in rows]}
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
