"""The shape of a model from published facts alone: no weights, no torch.

`shape_of` reads a profile, `shape_of_config` a parsed config.json. One function for each kind of
architecture stands in `SHAPES` of its family's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.catalog.schema import ModelProfile, Value
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.families.shapes.facts import FROM_FOLDER, ConfigFacts
from exporter.families.shapes.parts import ModelShape
from exporter.families.table import ALL_FAMILIES, config_defaults

SHAPES = {kind: shape for family in ALL_FAMILIES.values() for kind, shape in family.SHAPES.items()}


def shape_of(profile: ModelProfile) -> ModelShape:
    """The shape that a profile's facts say.

    Raises `InputRefused` when there is no function for its model_type or a size is not published.
    """
    values = with_defaults(profile.family, known_config(profile))
    facts = ConfigFacts(profile.title, values, profile.facts.preprocessor, profile.max_pixels)
    return _shape(profile.facts.model_type, facts)


def shape_of_config(
    title: str,
    family: str,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    max_pixels: int | None = None,
) -> ModelShape:
    """The shape of a parsed config.json and preprocessor_config.json; absent keys: class defaults.

    Raises `InputRefused` as `shape_of` does.
    """
    values = with_defaults(family, flattened(config))
    limits = image_limits(preprocessor)
    facts = ConfigFacts(title, values, limits, max_pixels, FROM_FOLDER)
    return _shape(str(config.get("model_type")), facts)


def with_defaults(family: str, known: Mapping[str, Value]) -> dict[str, Value]:
    """`known` and what the family's config class puts where config.json has no key.

    A size at the top level, as older and flat configs have it, replaces the text_config's default.
    """
    absent = {
        key: value
        for key, value in config_defaults(family).items()
        if value is not None and key.removeprefix("text_config.") not in known
    }
    return {**absent, **known}


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested objects as dotted keys; null counts as absent."""
    flat: dict[str, Value] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        elif value is not None:
            flat[prefix + key] = value
    return flat


def image_limits(preprocessor: Mapping[str, Any]) -> dict[str, Value]:
    """A preprocessor_config.json in the keys of `facts.preprocessor`."""
    side = _side(preprocessor)
    flat = flattened(preprocessor)
    names = {
        "size.longest_edge": "longest_edge",
        "max_image_size.longest_edge": "tile",
        "image_grid_pinpoints": "image_grid_pinpoints",
        "size.max_pixels": "max_pixels",
        "max_pixels": "max_pixels",
        "min_pixels": "min_pixels",
    }
    known = {name: flat[key] for key, name in names.items() if key in flat}
    return known if side is None else {"size": side, **known}


def _side(preprocessor: Mapping[str, Any]) -> Value:
    """The side of the square that every image becomes, or (height, width); None: it depends on the image.

    A shortest edge says nothing of it without the crop that follows.
    """
    crop = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", True) else None
    size = preprocessor.get("size") if crop is None else crop
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        return None
    height, width = size["height"], size["width"]
    return height if height == width else (height, width)


def _shape(model_type: str, facts: ConfigFacts) -> ModelShape:
    if model_type not in SHAPES:
        known = ", ".join(sorted(SHAPES))
        raise InputRefused(
            f"{facts.title}: model_type '{model_type}' has no known shape; known: {known}"
        )
    return SHAPES[model_type](facts)
