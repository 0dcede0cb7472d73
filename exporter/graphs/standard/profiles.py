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

from exporter.core.cases import EXAMPLE_MODALITY, prompt_for
from exporter.core.errors import InputRefused
from exporter.families.base import Preparer

# Tokens of text kept free for a prompt longer than the one measured.
TEXT = 256
# Height and width of images at which families cut into most tiles (square, wide, tall) and fewest
# (small, narrow).
LARGE = ((1536, 1536), (512, 1536), (1536, 512), (512, 2048), (2048, 512))
SMALL = ((32, 32), (8, 8), (20, 20), (64, 64), (8, 64), (64, 8), (32, 512), (512, 32))
PROBES = (*LARGE, *SMALL)
KEPT = "num_logits_to_keep"
PREFIX = "prefix_length"
# Counts of things of one size, of which there may be any number from one on.
COUNTS = ("tiles", "rows", "images")


@dataclass(frozen=True)
class Range:
    """Least, most likely and greatest size of an axis."""

    least: int
    likely: int
    greatest: int


@dataclass(frozen=True)
class Limits:
    """Greatest sizes: texts at once, prompt and context in places.

    `likely_prompt` is the length that an engine is tuned for; `prefix`: positions that see each other;
    `axes`: the axes of images by their names in the graphs, for one image of up to 1536 x 1536 or
    2048 x 512 pixels in a prompt.
    """

    batch: int
    prompt: int
    likely_prompt: int
    context: int
    prefix: int
    axes: Mapping[str, Range]


@dataclass(frozen=True)
class InputProfile:
    """Shapes of one input; with `values` the numbers in it instead, where it is a size itself."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    values: bool = False


GraphProfiles = dict[str, dict[str, InputProfile]]
InputShapes = Mapping[str, Sequence[int | str]]


def measured_limits(
    preparer: Preparer, prompt: str, vision: InputShapes, *, batch: int = 1
) -> Limits:
    """Limits of a model as its own preparer cuts images of several forms behind `prompt`.

    `vision`: the inputs of the vision graph, whose named axes are measured. Raises `InputRefused` when not even one image and the prompt fit the context.
    """
    sizes: dict[str, list[int]] = {}
    lengths, prefix = [], 0
    prompt = prompt_for(prompt, EXAMPLE_MODALITY)
    for height, width in PROBES:
        inputs = preparer.prepare([Image.new("RGB", (width, height), (90, 90, 90))], prompt)
        for feed in inputs.vision:
            for name, shape in vision.items():
                for axis, size in zip(shape, feed[name].shape, strict=True):
                    if isinstance(axis, str) and axis != "batch_size":
                        sizes.setdefault(axis, []).append(size)
        if inputs.image_mask is not None:
            sizes.setdefault("images", []).append(inputs.image_mask.shape[1])
        lengths.append(len(inputs.input_ids))
        prefix = max(prefix, inputs.prefix_length)
    context, longest = preparer.generation.max_positions, max(lengths)
    if min(lengths) >= context:
        raise InputRefused(f"an image with its prompt takes {min(lengths)} of {context} positions")
    longest = min(longest, context - 1)
    return Limits(
        batch=batch,
        prompt=min(longest + TEXT, context),
        likely_prompt=longest,
        context=context,
        prefix=prefix,
        axes={
            axis: Range(1 if axis in COUNTS else min(seen), max(seen), max(seen))
            for axis, seen in sorted(sizes.items())
        },
    )


def graph_profiles(name: str, inputs: InputShapes, limits: Limits) -> GraphProfiles:
    """Profiles of the graph `name` (a file's stem) by their names; `inputs`: shapes with axis names.

    Raises ValueError for an axis that has no limit.
    """
    batch = Range(1, 1, limits.batch)
    if "past_key_values.0.key" not in inputs:
        sequence = Range(1, 1, limits.prompt)
        axes = {**limits.axes, "batch_size": batch, "sequence_length": sequence}
        return {name: _profile(inputs, axes, 0)}
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
                **limits.axes,
                "batch_size": batch,
                "sequence_length": sequence,
                "past_sequence_length": behind,
                "total_sequence_length": both,
            },
            limits.prefix if use == "prefill" else 0,
        )
        for use, (sequence, behind, both) in uses.items()
    }


def read_shapes(path: Path) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    """Inputs and outputs of the graph file `path`; axis names where a size is not fixed."""
    graph = onnx.load_model(path, load_external_data=False).graph
    inputs, outputs = (
        {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def _profile(
    inputs: InputShapes, axes: Mapping[str, Range], prefix: int
) -> dict[str, InputProfile]:
    values = {
        KEPT: InputProfile((1,), (1,), (axes["sequence_length"].greatest,), values=True),
        PREFIX: InputProfile((0,), (prefix,), (prefix,), values=True),
    }
    return {
        name: values[name] if name in values else _shapes(name, shape, axes)
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
