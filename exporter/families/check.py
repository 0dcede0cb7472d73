"""Holds a checkpoint's config.json against the published facts of its profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.catalog.profiles import model_profiles
from exporter.catalog.schema import Facts, ModelProfile, Value
from exporter.core.errors import InputRefused
from exporter.families.table import config_defaults


def check_config(profile: ModelProfile, config: Mapping[str, Any]) -> None:
    """Compare a parsed config.json with the facts that were read for this checkpoint.

    Keys that are absent count with the class's default; facts that are null or only inferred are
    not compared. Raises `InputRefused` naming the first difference and the profile that fits.
    """
    wrong = differences(profile, config)
    if not wrong:
        return
    fits = [
        (len(_compared(other.facts)), other.name)
        for other in model_profiles().values()
        if _compared(other.facts) and not differences(other, config)
    ]
    advice = f"use --model {max(fits)[1]}" if fits else "give the folder itself: --model DIR"
    more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    raise InputRefused(f"this is not {profile.title}: {wrong[0]}{more}; {advice}")


def differences(profile: ModelProfile, config: Mapping[str, Any]) -> list[str]:
    """One phrase for each fact that `config` contradicts: ``hidden_size is 576, expected 960``."""
    facts = profile.facts
    expected: dict[str, Value] = {"model_type": facts.model_type}
    if config.get("architectures"):
        expected["architectures"] = facts.architecture
    expected |= _compared(facts)
    phrases = []
    for key, value in expected.items():
        found = config_value(config, key, profile.family)
        if not _same(found, value):
            phrases.append(f"{key} is {found}, expected {value}")
    return phrases


def config_value(config: Mapping[str, Any], key: str, family: str) -> Any:
    """The value at a dotted `key`, or what the family's config class puts there when absent."""
    if key == "architectures":
        return config["architectures"][0]
    defaults = config_defaults(family)
    if "hidden_size" in defaults and "text_config.hidden_size" not in defaults:
        config = _flat(config)
    section, _, leaf = key.rpartition(".")
    place = config.get(section, {}) if section else config
    if not isinstance(place, Mapping):
        raise InputRefused(f"config.json: {section} is {place!r}; expected an object")
    if place.get(leaf) is not None:
        return place[leaf]
    if leaf == "rope_theta" and isinstance(place.get("rope_parameters"), Mapping):
        # transformers 5 writes the rotary settings as one object.
        return place["rope_parameters"].get("rope_theta")
    default = defaults.get(key)
    return _computed(config, key, family) if default is None else default


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The published form, with the decoder's settings beside vision_config, of a config.json that
    transformers 5 wrote with a text_config.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    own = {k: v for k, v in config.items() if v is not None and k != "text_config"}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return {**text, "rope_scaling": rope, "rope_parameters": rope, **own}


def _computed(config: Mapping[str, Any], key: str, family: str) -> Any:
    section, _, leaf = key.rpartition(".")
    if leaf == "num_key_value_heads":
        return config_value(config, f"{section}.num_attention_heads", family)
    if leaf == "head_dim":
        size = config_value(config, f"{section}.hidden_size", family)
        heads = config_value(config, f"{section}.num_attention_heads", family)
        whole = type(size) is int and type(heads) is int and heads > 0
        return size // heads if whole else None
    return None


def _compared(facts: Facts) -> dict[str, Value]:
    return {key: value for key, value in facts.config.items() if value is not None}


def _same(found: Any, expected: Value) -> bool:
    numbers = (int, float)
    if isinstance(expected, tuple):
        whole = isinstance(found, list | tuple) and len(found) == len(expected)
        return whole and all(map(_same, found, expected))
    if type(found) in numbers and type(expected) in numbers:
        return math.isclose(found, float(expected), rel_tol=1e-9)  # type: ignore[arg-type]
    return type(found) is type(expected) and bool(found == expected)
