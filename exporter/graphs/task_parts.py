"""Which writer makes the graph of which kind of task spec. A new kind is one file and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.families.tasks import GraphSpec
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import WrittenGraph

# Folder, stem of the file, a spec of the row's own kind (hence Any), weights, accuracy level.
TaskWriter = Callable[[Path, str, Any, WeightSource, int], WrittenGraph]
TASK_WRITERS: Mapping[type, TaskWriter] = {}


def write_task_graph(
    folder: Path, name: str, spec: GraphSpec, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return TASK_WRITERS[type(spec)](folder, name, spec, weights, accuracy_level)
