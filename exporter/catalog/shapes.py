"""The tensors of a published checkpoint, from its profile alone."""

from __future__ import annotations

import math

from exporter.catalog.schema import ModelProfile, Value


def known_config(profile: ModelProfile) -> dict[str, Value]:
    """Facts of config.json by dotted key: what was read, and the inferred where nothing was."""
    read = {key: value for key, value in profile.facts.config.items() if value is not None}
    return {**profile.facts.inferred, **read}


def tensor_table(profile: ModelProfile) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors: each ``*`` of `tensor_shapes` gets its layer numbers.

    Raises ValueError when a starred name has no layer count among the facts.
    """
    config = known_config(profile)
    table: dict[str, tuple[int, ...]] = {}
    for pattern, shape in profile.facts.tensor_shapes.items():
        if "*" not in pattern:
            table[pattern] = shape
            continue
        part = "vision_config" if ".vision_model." in pattern else "text_config"
        layers = config.get(f"{part}.num_hidden_layers")
        if type(layers) is not int:
            raise ValueError(f"profile {profile.name}: {pattern} needs {part}.num_hidden_layers")
        table |= {pattern.replace("*", str(i)): shape for i in range(layers)}
    return table


def parameter_count(profile: ModelProfile) -> int:
    """Number of parameters in `tensor_table`."""
    return sum(math.prod(shape) for shape in tensor_table(profile).values())
