"""Which writer makes the graph of which kind of vision part. A new kind is one file and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.families.base import TowerSpec, VisionSpec
from exporter.graphs.tower import write_tower
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import WrittenGraph

# The first argument after the folder is a spec of the row's own kind, hence Any.
Writer = Callable[[Path, Any, WeightSource, int], WrittenGraph]
VISION_WRITERS: Mapping[type, Writer] = {TowerSpec: write_tower}


def write_vision(
    folder: Path, spec: VisionSpec, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``vision_encoder.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return VISION_WRITERS[type(spec)](folder, spec, weights, accuracy_level)
