"""Runs each exported graph once: a graph that is valid on paper can still fail or give NaN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from exporter.core.errors import InputRefused, ParityFailed
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.specs.decoder import TextDecoder
from exporter.families.table import family_of, task_family_of
from exporter.graphs import decoder, embedding, tower
from exporter.graphs.writer import MICROSOFT


@dataclass(frozen=True)
class GraphCheck:
    """One graph: its operators with how often each occurs, and the output shapes that were run."""

    name: str
    operators: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]


def check_graphs(model_dir: Path) -> tuple[GraphCheck, ...]:
    """Check the files of an exported ``model/`` folder and run each graph at two shapes.

    Raises `InputRefused` when a file is missing, a link or points outside, `ParityFailed` when a
    graph does not load, does not run, or gives a value that is not finite.
    """
    feeds = _feeds(read_config(model_dir / "config.json"))
    return tuple(_check(model_dir / "onnx" / f"{n}.onnx", f) for n, f in feeds.items())


def _feeds(config: Mapping[str, Any]) -> dict[str, Iterator[Feed]]:
    """Random inputs of each graph by its name."""
    task = task_family_of(config)
    if task is not None:
        specs = task.graphs(config).items()
        return {name: spec.example_feeds(np.random.default_rng(0)) for name, spec in specs}
    family = family_of(config)
    text, vision = family.decoder_spec(config), family.tower_spec(config)
    return {
        tower.NAME: vision.example_feeds(np.random.default_rng(0)),
        embedding.NAME: _embedding_feeds(text),
        decoder.NAME: text.example_feeds(np.random.default_rng(0)),
    }


def _check(path: Path, feeds: Iterator[Feed]) -> GraphCheck:
    operators = _read_structure(path)
    options = ort.SessionOptions()
    # Two short runs: threads that wait by spinning would only take time from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise ParityFailed(f"{path}: onnxruntime does not load it: {error}") from error
    shapes = []
    for feed in feeds:
        try:
            outputs = session.run(None, dict(feed))
        except Exception as error:
            raise ParityFailed(f"{path}: onnxruntime does not run it: {error}") from error
        for info, value in zip(session.get_outputs(), outputs, strict=True):
            if not np.isfinite(value).all():
                raise ParityFailed(f"{path}: output '{info.name}' is not finite on random inputs")
        shapes.append(tuple(outputs[0].shape))
    return GraphCheck(path.stem, operators, tuple(shapes))


def _read_structure(path: Path) -> dict[str, int]:
    if not path.is_file() or path.is_symlink():
        raise InputRefused(f"{path}: no regular file; export the model again")
    model = onnx.load_model(path, load_external_data=False)
    domains = {o.domain for o in model.opset_import}
    if not {""} <= domains <= {"", MICROSOFT}:
        raise InputRefused(f"{path}: operator sets {sorted(domains)}; expected '' and {MICROSOFT}")
    for tensor in model.graph.initializer:
        _check_external(path, tensor)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    place = {e.key: e.value for e in tensor.external_data}
    if not place:
        return
    data = path.parent / place.get("location", "")
    if place.get("location") != f"{path.name}_data" or data.is_symlink() or not data.is_file():
        raise InputRefused(
            f"{path}: weight '{tensor.name}' lies in {place.get('location')!r}; expected the regular "
            f"file {path.name}_data"
        )
    if int(place["offset"]) + int(place["length"]) > data.stat().st_size:
        raise InputRefused(f"{data}: too short for weight '{tensor.name}'; export the model again")


def _embedding_feeds(spec: TextDecoder) -> Iterator[Feed]:
    last = spec.vocab_size - 1
    yield {"input_ids": np.array([[0, last]], np.int64)}
    yield {"input_ids": np.array([[0, last, last // 2], [last // 3, 0, last]], np.int64)}
