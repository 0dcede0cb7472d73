"""Whether the graphs of a task family compute what torch computes with the same weights.

Each graph on random inputs of several shapes, and the graphs that begin on real ones: the float32
export against the torch model, each candidate against torch with the weights it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from exporter.compare.parity import (
    EXPORT,
    FLOAT_BOUND,
    INT8_ACTIVATION_BOUND,
    Check,
    relative_error,
)
from exporter.core.cases import Case
from exporter.core.errors import ParityFailed
from exporter.core.modelfiles import read_config
from exporter.core.progress import Progress, silent
from exporter.families.base import Feed
from exporter.families.table import required_task_family
from exporter.families.tasks import (
    ENCODER_GRAPH,
    SEQ2SEQ_DECODER,
    SEQ2SEQ_ENCODER,
    TEXT_GRAPH,
    VISION_GRAPH,
    Task,
)
from exporter.runtimes.graphs import Graphs, OrtGraphs, TorchGraphs
from exporter.runtimes.images import open_image

# Real images and texts that are tried.
SHOWN = 8


def check_graph_parity(
    reference: Path,
    exported_fp32: Path,
    candidates: Mapping[str, tuple[Path, Path]],
    inputs: Sequence[Case] | Sequence[str],
    *,
    threads: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check `exported_fp32` and each candidate's (float or quantized folder, exported folder).

    `inputs`: cases with images and captions, or texts, of which the first few are used. Returns what
    parity.json holds. Raises `ParityFailed` naming model, graph, output, value and bound.
    """
    config = read_config(reference / "config.json")
    family = required_task_family(config)
    preparer = family.open_preparer(reference)
    real = _real_feeds(family.TASK, preparer, inputs[:SHOWN])
    specs = family.graphs(config)
    feeds = {
        name: [*spec.example_feeds(np.random.default_rng(1)), *real.get(name, ())]
        for name, spec in specs.items()
    }
    pairs = {EXPORT: (reference, exported_fp32), **candidates}
    checks: list[Check] = []
    for done, (name, (weights, exported)) in enumerate(pairs.items()):
        progress(done, len(pairs), name)
        torch_graphs = TorchGraphs(weights, threads=threads)
        quantized = (weights / "quantization.json").is_file()
        # A decoder's products round activations to 8 bits, as captioners' do.
        bounds = {SEQ2SEQ_DECODER: INT8_ACTIVATION_BOUND} if quantized else {}
        graphs = OrtGraphs(exported, threads=threads)
        checks += _compare(name, torch_graphs, graphs, feeds, bounds)
    return {
        "summary": _summary(checks),
        "checks": msgspec.to_builtins(checks),
    }


def _real_feeds(
    task: Task, preparer: Any, inputs: Sequence[Case] | Sequence[str]
) -> dict[str, list[Feed]]:
    """Inputs of the graphs that a task begins with, as its preparer makes them."""
    texts = [i if isinstance(i, str) else i.caption or i.modality for i in inputs]
    if task == "text-encoder":
        return {ENCODER_GRAPH: [preparer.texts(texts)]}
    if task == "summary":
        return {SEQ2SEQ_ENCODER: [preparer.text(text) for text in texts]}
    images = [open_image(i.image) for i in inputs if not isinstance(i, str)]
    return {
        VISION_GRAPH: [preparer.images([image]) for image in images],
        TEXT_GRAPH: [preparer.texts(texts)],
    }


def _compare(
    name: str,
    truth: Graphs,
    exported: Graphs,
    feeds: Mapping[str, Sequence[Feed]],
    bounds: Mapping[str, float],
) -> Iterator[Check]:
    for graph, examples in feeds.items():
        errors: dict[str, float] = {}
        for number, feed in enumerate(examples):
            theirs, ours = truth.run(graph, feed), exported.run(graph, feed)
            if theirs.keys() != ours.keys():
                raise ParityFailed(
                    f"{graph} of {name}: outputs {sorted(ours)}, torch gives {sorted(theirs)}; "
                    "export the model again"
                )
            for output, value in theirs.items():
                errors[f"{output} of example {number + 1}"] = relative_error(value, ours[output])
        worst = max(errors, key=lambda where: errors[where])
        bound = bounds.get(graph, FLOAT_BOUND)
        if not errors[worst] <= bound:
            raise ParityFailed(
                f"{graph} of {name}, {worst}: relative error {errors[worst]:.3g} to torch with the "
                f"same weights, expected at most {bound:g}; the graph does not compute the "
                "model, do not use this export"
            )
        yield Check(name, graph, len(examples), worst, errors[worst], bound)


def _summary(checks: Sequence[Check]) -> str:
    worst: dict[str, float] = {}
    for check in checks:
        worst[check.model] = max(worst.get(check.model, 0.0), check.relative_error)
    graphs = len({check.graph for check in checks})
    errors = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return f"{graphs} graph(s) equal to torch on random and real inputs; relative error {errors}"
