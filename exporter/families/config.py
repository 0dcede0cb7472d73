"""Reads settings out of a parsed config.json, with one-line errors.

Absent keys take the defaults of transformers' config classes, which the families give: published
configs leave many of them out. A null counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.core.errors import InputRefused


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at `key`. Raises `InputRefused` when it is none."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise InputRefused(f"config.json: {key} is {value!r}; expected an object")
    return value


def count(section: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """A positive integer; absent and null give `default`. Raises `InputRefused`."""
    value = default if section.get(key) is None else section[key]
    if type(value) is not int or value < 1:
        raise InputRefused(f"config.json: {where}.{key} is {value!r}; expected a positive integer")
    return value


def tied_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a config.json says ``tie_word_embeddings``: the whole, or an encoder-decoder's decoder part,
    whose class ties them (what its top level says is of encoder and decoder).
    """
    decoder = config.get("decoder")
    return decoder if isinstance(decoder, Mapping) else config


def with_tied(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The same config.json with another ``tie_word_embeddings``."""
    section = {**tied_section(config), "tie_word_embeddings": tied}
    return section if tied_section(config) is config else {**config, "decoder": section}


def positive(section: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A positive, finite number; absent and null give `default`. Raises `InputRefused`."""
    value = default if section.get(key) is None else section[key]
    if type(value) not in (int, float) or not 0.0 < value < float("inf"):
        raise InputRefused(f"config.json: {where}.{key} is {value!r}; expected a positive number")
    return float(value)


def flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; absent and null give `default`. Raises `InputRefused`."""
    value = default if section.get(key) is None else section[key]
    if type(value) is not bool:
        raise InputRefused(f"config.json: {key} is {value!r}; expected true or false")
    return value


def image_token(config: Mapping[str, Any]) -> int | None:
    """The id of the image token, under either of its names; None when config.json has none."""
    found = config.get("image_token_id", config.get("image_token_index"))
    return found if type(found) is int else None


def choice(
    section: Mapping[str, Any], key: str, default: str, known: tuple[str, ...], where: str
) -> str:
    """One of `known`; absent and null give `default`. Raises `InputRefused`."""
    value = default if section.get(key) is None else section[key]
    if value not in known:
        raise InputRefused(
            f"config.json: {where}.{key} is {value!r}; expected {' or '.join(known)}"
        )
    return str(value)


def rope_theta(text: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies. Raises `InputRefused` for a scaled rotary."""
    # transformers 5 writes rope_parameters; published configs have rope_theta and rope_scaling.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputRefused(f"config.json: rope_parameters is {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputRefused(f"config.json: rope_type is {kind!r}; only 'default' is known")
    source = rope if rope.get("rope_theta") is not None else text
    return positive(source, "rope_theta", 10000.0, "text_config")
