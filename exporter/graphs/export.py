"""One model folder in, its graphs and the small files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from exporter.core.artifact import need_space, write_atomic
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.modelfiles import copy_small_files, read_config
from exporter.core.progress import Progress, silent
from exporter.families.table import family_of, task_family_of
from exporter.families.tasks import SEQ2SEQ_DECODER, Task, TaskFamily, task_tensors
from exporter.graphs.decoder import DecoderOptions
from exporter.graphs.parts import write_text_decoder, write_tokens, write_vision
from exporter.graphs.readers import complete_for_readers, say_where_weights_lie
from exporter.graphs.standard.compute import compute_in_float16
from exporter.graphs.standard.parts import write_standard
from exporter.graphs.standard.report import PROMPT, StandardReport, describe
from exporter.graphs.task_parts import write_task_graph
from exporter.graphs.weights import FloatStorage, WeightSource
from exporter.graphs.writer import OPSET, WrittenGraph

SCHEMA = 1
Dialect = Literal["ort", "standard"]
Compute = Literal["float32", "float16"]


@dataclass(frozen=True)
class ExportReport:
    """What was written. `bits`: per tensor of the source (32, 16, 8 or 4); `unused`: why not written;
    `standard`: what only the standard dialect has.
    """

    dialect: str
    float_storage: str
    accuracy_level: int
    tower_accuracy_level: int
    opset: int
    parts: tuple[WrittenGraph, ...]
    bits: Mapping[str, int]
    unused: Mapping[str, str]
    standard: StandardReport | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all graph and data files."""
        return sum(p.graph_bytes + p.data_bytes for p in self.parts)


def export_model(  # noqa: PLR0913 (each is one decision of the caller)
    source: Path,
    out: Path,
    *,
    dialect: Dialect = "ort",
    float_storage: FloatStorage = "float16",
    accuracy_level: int = 4,
    tower_accuracy_level: int = 0,
    compute: Compute = "float32",
    examples: Sequence[Image] = (),
    progress: Progress = silent,
) -> ExportReport:
    """Write ``model/`` (small files, ``onnx/``) and ``export.json`` into the existing folder `out`.

    `source` is a merged or quantized folder. Float matrices are kept as `float_storage`, packed
    ones as they are; the accuracy levels of decoder and tower are MatMulNBits' (0 computes in
    float32, 4 in int8: several times faster where one row meets a matrix, which is decoding). Each
    tensor of the source is used exactly once (a tied embedding twice) or the export fails.
    The dialect `standard` has no operators of onnxruntime's own; it computes in float32, and its
    graphs are held against the operators that TensorRT's parser takes. With `compute` float16 it
    computes in float16 but for layers that leave its range on `examples` (images; none: drawn ones), see
    `graphs.standard.float16`; the ort dialect refuses that.
    Raises `InputRefused` for a bad source, `EnvironmentLacks` when the disk is too small.
    """
    config = read_config(source / "config.json")
    if compute == "float16":
        _refuse_float16(dialect, float_storage)
    task = task_family_of(config)
    if task is not None:
        refuse_dialect(task.TASK, dialect)
        weights = WeightSource(source, float_storage, progress)
        return _export_task(source, out, task, config, weights, float_storage, accuracy_level)
    if dialect == "standard":
        accuracy_level = tower_accuracy_level = 0
    asked = _Asked(dialect, float_storage, accuracy_level, tower_accuracy_level, compute)
    return _export_captioner(source, out, config, asked, examples, progress)


@dataclass(frozen=True)
class _Asked:
    """How a captioner's graphs are written; see `export_model`."""

    dialect: Dialect
    float_storage: FloatStorage
    accuracy_level: int
    tower_accuracy_level: int
    compute: Compute


def _export_captioner(
    source: Path,
    out: Path,
    config: Mapping[str, Any],
    asked: _Asked,
    examples: Sequence[Image],
    progress: Progress,
) -> ExportReport:
    family = family_of(config)
    decoder, tower = family.decoder_spec(config), family.tower_spec(config)
    weights = WeightSource(source, asked.float_storage, progress)
    need_space(out, weights.graph_bytes())
    model = out / "model"
    onnx = model / "onnx"
    onnx.mkdir(parents=True)
    widened: Mapping[str, str] = {}
    if asked.dialect == "standard":
        half = asked.compute == "float16"
        parts, widened = write_standard(onnx, decoder, tower, weights, half=half)
    else:
        parts = (
            write_vision(onnx, tower, weights, asked.tower_accuracy_level),
            write_tokens(onnx, decoder, weights),
            write_text_decoder(onnx, decoder, weights, DecoderOptions(asked.accuracy_level)),
        )
    report = ExportReport(
        dialect=asked.dialect,
        float_storage=asked.float_storage,
        accuracy_level=asked.accuracy_level,
        tower_accuracy_level=asked.tower_accuracy_level,
        opset=OPSET,
        parts=parts,
        bits=weights.bits,
        unused=weights.finish([*decoder.tensors(), *tower.tensors()]),
    )
    copy_small_files(source, model)
    complete_for_readers(model, parts, genai=asked.dialect == "ort")
    if asked.dialect == "standard":
        report = _described(report, model, widened, asked.compute, examples)
    _write_report(report, out)
    return report


def _described(
    report: ExportReport,
    model: Path,
    widened: Mapping[str, str],
    compute: Compute,
    examples: Sequence[Image],
) -> ExportReport:
    """`report` with what only the standard dialect has, its graphs turned to float16 where asked."""
    if compute == "float32":
        return replace(report, standard=describe(model, report.parts, widened))
    made = compute_in_float16(model, report.parts, examples, PROMPT)
    standard = replace(
        describe(model, made.parts, widened),
        compute=compute,
        kept_float32=made.kept,
        float16_difference=made.difference,
    )
    return replace(report, parts=made.parts, standard=standard)


def _refuse_float16(dialect: Dialect, storage: FloatStorage) -> None:
    if dialect != "standard":
        raise WrongUsage(
            f"--compute float16 is for the standard dialect; the {dialect} dialect computes in float32"
        )
    if storage != "float16":
        raise WrongUsage(f"--compute float16 reads float16 weights, not {storage} ones")


def refuse_dialect(task: Task, dialect: Dialect) -> None:
    """Raise `InputRefused` for a dialect that the graphs of task families are not written in."""
    if dialect != "ort":
        raise InputRefused(
            f"the {dialect} dialect is written for captioners alone, and this is a {task} model; "
            "use --dialect ort"
        )


def _export_task(
    source: Path,
    out: Path,
    task: TaskFamily,
    config: Mapping[str, Any],
    weights: WeightSource,
    storage: FloatStorage,
    accuracy_level: int,
) -> ExportReport:
    """The graphs of a task family. They compute in float32, as an image or a text is seen once; but
    for a decoder, which reads its weights for every token.
    """
    need_space(out, weights.graph_bytes())
    model = out / "model"
    onnx = model / "onnx"
    onnx.mkdir(parents=True)
    levels = {SEQ2SEQ_DECODER: accuracy_level}
    parts = tuple(
        write_task_graph(onnx, name, spec, weights, levels.get(name, 0))
        for name, spec in task.graphs(config).items()
    )
    report = ExportReport(
        dialect="ort",
        float_storage=storage,
        accuracy_level=accuracy_level,
        tower_accuracy_level=0,
        opset=OPSET,
        parts=parts,
        bits=weights.bits,
        unused=weights.finish(task_tensors(task, config)),
    )
    copy_small_files(source, model)
    say_where_weights_lie(model, parts)
    _write_report(report, out)
    return report


def _write_report(report: ExportReport, out: Path) -> None:
    fields = {k: v for k, v in asdict(report).items() if v is not None}
    write_atomic(out / "export.json", canonical_json({"schema": SCHEMA, **fields}))
