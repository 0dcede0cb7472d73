"""What export.json says of graphs in the standard dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporter.core.modelfiles import read_config
from exporter.families.specs.idefics import GatedLlama
from exporter.families.table import family_of
from exporter.graphs.standard.operators import require_supported
from exporter.graphs.standard.profiles import (
    GraphProfiles,
    InputShapes,
    Limits,
    Range,
    graph_profiles,
    measured_limits,
    read_shapes,
)
from exporter.graphs.standard.table import SOURCE
from exporter.graphs.tower import NAME as VISION
from exporter.graphs.writer import WrittenGraph

PROMPT = "Describe this medical image."
NOT_RUN = "held against the parser's documentation; TensorRT itself was not run"


@dataclass(frozen=True)
class StandardReport:
    """Operators of each graph with how often they occur, the optimization profiles with the limits
    that they follow from (none without a tokenizer, which prompts are measured with), and which
    matrices were stored wider than they came, and why. With `compute` float16 also the nodes of each
    graph that stay in float32 for what was found in them, and how far its outputs are from float32's on
    the first example, as a share of the largest value.
    """

    operators: Mapping[str, Mapping[str, int]]
    limits: Limits | None
    profiles: Mapping[str, GraphProfiles]
    widened: Mapping[str, str]
    compute: str = "float32"
    kept_float32: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    float16_difference: Mapping[str, float] = field(default_factory=dict)
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
        limits = _limits(model, *read_shapes(paths[VISION]))
        profiles = {n: graph_profiles(n, read_shapes(p)[0], limits) for n, p in paths.items()}
    return StandardReport(operators, limits, profiles, widened)


def _limits(model: Path, inputs: InputShapes, outputs: InputShapes) -> Limits:
    """Limits of the exported folder `model`, whose vision graph has these inputs and outputs."""
    config = read_config(model / "config.json")
    family = family_of(config)
    limits = measured_limits(family.open_preparer(model), PROMPT, inputs)
    rows = outputs.get("cross_key_values.0.key", ["", "", 0])[2]
    if isinstance(rows, str):
        # As many latents for each image.
        decoder = family.decoder_spec(config)
        if not isinstance(decoder, GatedLlama):
            raise ValueError(f"{type(decoder).__name__} does not say how many rows an image has")
        rows = limits.axes["images"].greatest * decoder.latents
    if not rows:
        return limits
    return replace(limits, axes={**limits.axes, "image_rows": Range(rows, rows, rows)})
