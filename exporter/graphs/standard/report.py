"""What export.json says of graphs in the standard dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exporter.core.modelfiles import read_config
from exporter.families.table import family_of
from exporter.graphs.standard.operators import require_supported
from exporter.graphs.standard.profiles import (
    GraphProfiles,
    Limits,
    graph_profiles,
    measured_limits,
    read_inputs,
)
from exporter.graphs.standard.table import SOURCE
from exporter.graphs.writer import WrittenGraph

PROMPT = "Describe this medical image."
NOT_RUN = "held against the parser's documentation; TensorRT itself was not run"


@dataclass(frozen=True)
class StandardReport:
    """Operators of each graph with how often they occur, the optimization profiles with the limits
    that they follow from (none without a tokenizer, which prompts are measured with), and which
    matrices were stored wider than they came, and why.
    """

    operators: Mapping[str, Mapping[str, int]]
    limits: Limits | None
    profiles: Mapping[str, GraphProfiles]
    widened: Mapping[str, str]
    table: str = field(default=SOURCE)
    checked: str = field(default=NOT_RUN)


def describe(
    model: Path, parts: Sequence[WrittenGraph], widened: Mapping[str, str]
) -> StandardReport:
    """Hold the graphs of an exported folder `model` against the parser's table and derive profiles.

    Raises `InputRefused` naming the first operator that is not taken.
    """
    paths = {part.name: model / "onnx" / f"{part.name}.onnx" for part in parts}
    operators = {name: require_supported(path) for name, path in paths.items()}
    limits, profiles = None, {}
    if (model / "tokenizer.json").is_file():
        preparer = family_of(read_config(model / "config.json")).open_preparer(model)
        limits = measured_limits(preparer, PROMPT)
        profiles = {n: graph_profiles(n, read_inputs(p), limits) for n, p in paths.items()}
    return StandardReport(operators, limits, profiles, widened)
