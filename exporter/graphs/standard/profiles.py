"""Optimization profiles: within which shapes an engine must work, from a model's own limits.

TensorRT builds an engine for ranges of each dynamic axis (least, most likely, greatest). The decoder
graph gets two profiles, as its two uses share no shape: the prompt behind an empty past, and one token
behind a past that grows to the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.base import Preparer

# Tokens of text kept free for a prompt longer than the one measured.
TEXT = 256
# Height and width of images at which families cut into most tiles: square, wide, tall, small.
PROBES = ((1536, 1536), (512, 1536), (1536, 512), (512, 2048), (2048, 512), (32, 32))
KEPT = "num_logits_to_keep"


@dataclass(frozen=True)
class Limits:
    """Greatest sizes: texts at once, tiles and feature rows of an image, prompt and context in places.

    `likely_prompt` is the length that an engine is tuned for.
    """

    batch: int
    tiles: int
    rows: int
    prompt: int
    likely_prompt: int
    context: int


@dataclass(frozen=True)
class Range:
    """Least, most likely and greatest size of an axis."""

    least: int
    likely: int
    greatest: int


@dataclass(frozen=True)
class InputProfile:
    """Shapes of one input; with `values` the numbers in it instead, where it is a size itself."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    values: bool = False


GraphProfiles = dict[str, dict[str, InputProfile]]
InputShapes = Mapping[str, Sequence[int | str]]


def measured_limits(preparer: Preparer, prompt: str, *, batch: int = 1) -> Limits:
    """Limits of a model as its own preparer cuts images of several forms behind `prompt`.

    Raises `InputRefused` when not even one image and the prompt fit the context.
    """
    tiles, rows, lengths = [1], [1], []
    for height, width in PROBES:
        inputs = preparer.prepare([Image.new("RGB", (width, height), (90, 90, 90))], prompt)
        for feed in inputs.vision:
            tiles.append(int(feed["pixel_values"].shape[1]))
            if "feature_index" in feed:
                rows.append(len(feed["feature_index"]))
        lengths.append(len(inputs.input_ids))
    context, longest = preparer.generation.max_positions, max(lengths)
    if min(lengths) >= context:
        raise InputRefused(f"an image with its prompt takes {min(lengths)} of {context} positions")
    longest = min(longest, context - 1)
    return Limits(
        batch=batch,
        tiles=max(tiles),
        rows=max(rows),
        prompt=min(longest + TEXT, context),
        likely_prompt=longest,
        context=context,
    )


def graph_profiles(name: str, inputs: InputShapes, limits: Limits) -> GraphProfiles:
    """Profiles of the graph `name` (a file's stem) by their names; `inputs`: shapes with axis names.

    Raises ValueError for an axis that has no limit.
    """
    batch = Range(1, 1, limits.batch)
    if "past_key_values.0.key" not in inputs:
        sequence = Range(1, 1, limits.prompt)
        axes = {
            "batch_size": batch,
            "tiles": Range(1, limits.tiles, limits.tiles),
            "rows": Range(1, limits.rows, limits.rows),
            "sequence_length": sequence,
        }
        return {name: _profile(inputs, axes)}
    prompt = Range(1, limits.likely_prompt, limits.prompt)
    last = limits.context - 1
    past = Range(1, min(limits.likely_prompt, last), last)
    total = Range(past.least + 1, past.likely + 1, past.greatest + 1)
    uses = {
        "prefill": (prompt, Range(0, 0, 0), prompt),
        "decode": (Range(1, 1, 1), past, total),
    }
    return {
        use: _profile(
            inputs,
            {
                "batch_size": batch,
                "sequence_length": sequence,
                "past_sequence_length": behind,
                "total_sequence_length": both,
            },
        )
        for use, (sequence, behind, both) in uses.items()
    }


def read_inputs(path: Path) -> dict[str, list[int | str]]:
    """Inputs of the graph file `path` with their shapes; axis names where a size is not fixed."""
    graph = onnx.load_model(path, load_external_data=False).graph
    return {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in graph.input
    }


def _profile(inputs: InputShapes, axes: Mapping[str, Range]) -> dict[str, InputProfile]:
    return {
        name: InputProfile((1,), (1,), (axes["sequence_length"].greatest,), values=True)
        if name == KEPT
        else _shapes(name, shape, axes)
        for name, shape in inputs.items()
    }


def _shapes(name: str, shape: Sequence[int | str], axes: Mapping[str, Range]) -> InputProfile:
    if lost := [s for s in shape if isinstance(s, str) and s not in axes]:
        raise ValueError(f"input '{name}' has the axis '{lost[0]}', of which no limit is known")
    ranges = [axes[s] if isinstance(s, str) else Range(s, s, s) for s in shape]
    return InputProfile(
        tuple(r.least for r in ranges),
        tuple(r.likely for r in ranges),
        tuple(r.greatest for r in ranges),
    )
