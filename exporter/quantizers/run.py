"""Quantize a model folder, tensor by tensor, from safetensors to safetensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.artifact import need_space
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused, MedexportError, WrongUsage
from exporter.core.modelfiles import copy_small_files
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint, SafetensorsWriter, to_float32, total_bytes
from exporter.families.checkpoints import published_config
from exporter.families.config import with_tied
from exporter.families.table import family_of, task_family_of
from exporter.quantizers.bnb import BnbMatrices
from exporter.quantizers.guards import guard
from exporter.quantizers.hqq import hqq_rows
from exporter.quantizers.plan import LayerPlan, plan_model
from exporter.quantizers.ready import ReadyTensor, ReadyTensors, packed_tensors
from exporter.quantizers.rtn import QuantizedMatrix, join_rows, quantize_rows, row_chunks
from exporter.quantizers.schemes import BNB, Scheme
from exporter.quantizers.settings import method_settings

REPORT = "quantization.json"
SCHEMA = 1
# Weights read ahead of the writer at most (one larger matrix alone is allowed): bounds the memory.
AHEAD = 16 << 20
MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class QuantizedLayer:
    """A stored matrix with what it lost: Frobenius norm of the error over that of the matrix.

    `notes`: further keys of its row in quantization.json (guards, and what the method reports).
    """

    plan: LayerPlan
    relative_error: float
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class QuantizationReport:
    """What was written: `layers` quantized, `floats` kept with a reason; `settings` by method.

    `source_bytes` and `stored_bytes` are those of all tensors before and after.
    """

    scheme: str
    layers: tuple[QuantizedLayer, ...]
    floats: tuple[LayerPlan, ...]
    source_bytes: int
    stored_bytes: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The content of quantization.json."""
        return {
            "schema": SCHEMA,
            "scheme": self.scheme,
            "settings": dict(self.settings),
            "layers": [_layer_row(layer) for layer in self.layers],
            "floats": [{"name": f.name, "reason": f.reason, "bytes": f.bytes} for f in self.floats],
        }


def quantize_model(
    source: Path, out: Path, scheme: Scheme, *, threads: int, progress: Progress = silent
) -> QuantizationReport:
    """Quantize the model folder `source` into the empty folder `out`.

    The bytes written do not depend on `threads`; memory is bounded by the largest matrix. Progress
    counts weights. Raises `WrongUsage` for a scheme without quantized parts, `InputRefused` for a
    folder that is not a float model of a known family, `EnvironmentLacks` when the disk is too full,
    `MedexportError` when what was written is not what was planned.
    """
    if not scheme.quantizes:
        raise WrongUsage(
            f"scheme {scheme.name} quantizes nothing; export the merged folder as it is"
        )
    if scheme.calibrated:
        raise WrongUsage(
            f"scheme {scheme.name} needs calibration images; use `medexport build`, or int4-hqq or "
            "int4-rtn here"
        )
    ready = BnbMatrices(Checkpoint.open(source)) if scheme.method in BNB else None
    return write_model(source, out, scheme, ready, threads=threads, progress=progress)


def write_model(
    source: Path,
    out: Path,
    scheme: Scheme,
    ready: ReadyTensors | None,
    *,
    plan: Sequence[LayerPlan] | None = None,
    threads: int,
    progress: Progress = silent,
) -> QuantizationReport:
    """As `quantize_model`, with the tensors that `ready` has taken from there.

    `plan` is the scheme's own unless given.
    """
    config = published_config(source)
    if (source / REPORT).exists():
        raise InputRefused(f"{source}: already quantized ({REPORT}); expected a float model")
    checkpoint = Checkpoint.open(source)
    plan = plan or plan_model(checkpoint, config, scheme)
    need_space(out, sum(p.bytes for p in plan) + (64 << 20))
    copy_small_files(source, out)
    if _newly_tied(config, plan):
        # The head is the embedding and is stored once: readers learn it from the config.
        (out / "config.json").write_bytes(canonical_json(with_tied(config, True)))
    report = write_planned(
        checkpoint,
        plan,
        out,
        scheme.name,
        settings=method_settings(scheme),
        ready=ready,
        threads=threads,
        progress=progress,
    )
    source_bytes = total_bytes(checkpoint.tensors.values())
    return replace(report, source_bytes=source_bytes)


def _newly_tied(config: Mapping[str, Any], plan: Sequence[LayerPlan]) -> bool:
    """Whether config.json says that the head is a matrix of its own and the plan stores none."""
    if task_family_of(config) is not None:
        return False
    decoder = family_of(config).decoder_spec(config)
    return not decoder.tied and all(p.name != decoder.head for p in plan)


def write_planned(
    checkpoint: Checkpoint,
    plan: Sequence[LayerPlan],
    out: Path,
    scheme: str,
    *,
    settings: Mapping[str, Any] | None = None,
    ready: ReadyTensors | None = None,
    threads: int,
    progress: Progress = silent,
) -> QuantizationReport:
    """Write model.safetensors and quantization.json for the tensors of `plan` alone.

    Raises `MedexportError` when what was written is not what was planned.
    """
    path = out / "model.safetensors"
    layers = _write_tensors(checkpoint, plan, ready, path, threads, progress)
    _check_written(out, plan)
    report = QuantizationReport(
        scheme,
        tuple(layers[p.name] for p in plan if p.format),
        tuple(p for p in plan if not p.format),
        total_bytes(checkpoint.info(p.name) for p in plan),
        sum(p.bytes for p in plan),
        settings or {},
    )
    (out / REPORT).write_bytes(canonical_json(report.document()))
    return report


@dataclass(frozen=True)
class _Part:
    """A quantized piece of rows, and the summed squares of its columns."""

    matrix: QuantizedMatrix
    squares: NDArray[np.float64]


@dataclass(frozen=True)
class _Pending:
    plan: LayerPlan
    parts: list[Future[_Part]]
    values: NDArray[Any]
    ready: ReadyTensor | None

    @property
    def weights(self) -> int:
        return int(np.prod(self.plan.shape))


def _write_tensors(
    checkpoint: Checkpoint,
    plan: Sequence[LayerPlan],
    ready: ReadyTensors | None,
    path: Path,
    threads: int,
    progress: Progress,
) -> dict[str, QuantizedLayer]:
    """Write all tensors in the plan's order; returns what each quantized one lost, by name."""
    entries = {name: entry for p in plan for name, entry in p.entries().items()}
    total = sum(int(np.prod(p.shape)) for p in plan)
    done, layers = 0, {}
    with ThreadPoolExecutor(threads) as pool, SafetensorsWriter(path, entries) as writer:
        for pending in _read_ahead(_started(checkpoint, plan, ready, pool)):
            layer, given = pending.plan, pending.ready
            if given:
                for name in layer.entries():
                    writer.write(name, given.stored[name])
                layers[layer.name] = QuantizedLayer(layer, given.relative_error, given.notes)
            elif layer.format is None:
                writer.write(layer.name, as_float16(layer.name, pending.values))
            else:
                layers[layer.name] = _write_parts(writer, pending)
            done += pending.weights
            progress(done, total, layer.name)
    return layers


def _started(
    checkpoint: Checkpoint,
    plan: Sequence[LayerPlan],
    ready: ReadyTensors | None,
    pool: ThreadPoolExecutor,
) -> Iterator[_Pending]:
    """Read tensor after tensor and hand its rows to the pool."""
    for layer in plan:
        given = ready.take(layer) if ready else None
        if given:
            yield _Pending(layer, [], np.empty(0), given)
            continue
        values = checkpoint.raw(layer.name)
        if layer.turned:
            values = np.ascontiguousarray(values.T)
        dtype = checkpoint.info(layer.name).dtype
        if dtype == "BF16":
            values = to_float32(values, dtype)
        fmt = layer.format
        chunks = row_chunks(layer.rows, layer.columns, fmt.block) if fmt else []
        parts = [pool.submit(_quantize_part, values[rows], layer) for rows in chunks]
        yield _Pending(layer, parts, values, None)


def _quantize_part(values: NDArray[Any], layer: LayerPlan) -> _Part:
    if layer.format is None or layer.method == "smoothquant":
        raise ValueError(f"{layer.name} is not quantized here")
    if layer.method == "hqq":
        matrix = hqq_rows(values, layer.format, name=layer.name)
    else:
        search = layer.method == "rtn-mse"
        matrix = quantize_rows(values, layer.format, search=search, name=layer.name)
    wide = values.astype(np.float32)
    return _Part(matrix, np.einsum("nk,nk->k", wide, wide).astype("f8"))


def _write_parts(writer: SafetensorsWriter, pending: _Pending) -> QuantizedLayer:
    parts = [part.result() for part in pending.parts]
    name, result = pending.plan.name, join_rows([part.matrix for part in parts])
    squares = np.sum([part.squares for part in parts], axis=0)
    guards = guard(result.packed, squares, of="weights", name=name)
    for key, array in packed_tensors(name, result.packed).items():
        writer.write(key, array)
    return QuantizedLayer(pending.plan, result.relative_error, guards.document())


def _read_ahead(started: Iterator[_Pending]) -> Iterator[_Pending]:
    """Keep up to `AHEAD` weights in work, so that no thread waits for the writer."""
    waiting: deque[_Pending] = deque()
    weights = 0
    for pending in started:
        waiting.append(pending)
        weights += pending.weights
        while weights > AHEAD:
            weights -= waiting[0].weights
            yield waiting.popleft()
    yield from waiting


def as_float16(name: str, values: NDArray[Any]) -> NDArray[np.float16]:
    """Float16 values of a tensor kept in float. Raises `InputRefused` where they do not fit."""
    largest = float(np.abs(values.astype(np.float32)).max(initial=0.0))
    if not largest <= MAX_FLOAT16:
        raise InputRefused(
            f"tensor '{name}' holds {largest}; expected finite values within float16 (65504)"
        )
    return values.astype(np.float16)


def _check_written(out: Path, plan: Sequence[LayerPlan]) -> None:
    """Read the file's table back and compare it with the plan. Raises `MedexportError`."""
    written = {n: (i.dtype, i.shape) for n, i in Checkpoint.open(out).tensors.items()}
    planned = {name: entry for p in plan for name, entry in p.entries().items()}
    wrong = sorted(n for n in written.keys() | planned.keys() if written.get(n) != planned.get(n))
    if wrong:
        raise MedexportError(
            f"{out}: {len(wrong)} tensors are not as planned, first '{wrong[0]}': "
            f"{written.get(wrong[0])} instead of {planned.get(wrong[0])}"
        )


def _layer_row(layer: QuantizedLayer) -> dict[str, Any]:
    plan, fmt = layer.plan, layer.plan.format
    if fmt is None:
        raise ValueError(f"{plan.name} is not quantized")
    return {
        "name": plan.name,
        "kind": plan.kind,
        "bits": fmt.bits,
        "block": fmt.block,
        "symmetric": fmt.symmetric,
        "columns": plan.columns,
        "rows": plan.rows,
        "method": plan.method,
        "relative_error": layer.relative_error,
        "bytes": plan.bytes,
        **({"turned": True} if plan.turned else {}),
        **layer.notes,
    }
