"""Regular expressions of an adapter_config.json: peft's meaning, without running hostile ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from exporter.core.errors import InputRefused

V = TypeVar("V", int, float)

MAX_LENGTH = 500
# Matching takes about (length of a module's name) ** (open repetitions) * 2 ** (choices) steps.
MAX_OPEN, MAX_CHOICES, MAX_ALTERNATIVES = 3, 4, 32
REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
BACKREFERENCE = re.compile(r"\\[1-9]|\(\?P=")
OPEN = re.compile(r"[*+]|\{\d*,\}")
OPTIONAL = re.compile(r"(?<![(*+?])\?|\{\d*,\d+\}")


def check_pattern(pattern: str, key: str) -> str:
    """Return `pattern` when it is a regular expression of bounded cost, else raise `InputRefused`.

    Refused: a repeated group, a back reference, more than 3 open repetitions, more than 4 optional
    parts or groups of alternatives, over 500 characters; `key` is its place in adapter_config.json.
    """
    plain = re.sub(r"\[[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))
    costly = (
        len(pattern) > MAX_LENGTH
        or REPEATED_GROUP.search(plain)
        or BACKREFERENCE.search(pattern)
        or len(OPEN.findall(plain)) > MAX_OPEN
        or len(OPTIONAL.findall(plain)) + _alternations(plain) > MAX_CHOICES
        or plain.count("|") > MAX_ALTERNATIVES
    )
    if costly:
        raise InputRefused(
            f"adapter_config.json: the pattern of '{key}' ({pattern[:60]!r}) could take very long to "
            f"match; expected at most {MAX_OPEN} repetitions, {MAX_CHOICES} choices, no repeated group"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputRefused(
            f"adapter_config.json: '{key}' holds {pattern[:60]!r}, not a regular expression ({error})"
        ) from error
    return pattern


def _alternations(pattern: str) -> int:
    """Number of groups, at any depth, that have alternatives."""
    found = 0
    open_groups = [False]
    for character in pattern:
        if character == "(":
            open_groups.append(False)
        elif character == "|":
            open_groups[-1] = True
        elif character == ")" and len(open_groups) > 1:
            found += open_groups.pop()
    return found


def look_up(patterns: Mapping[str, V], module: str, default: V) -> V:
    """Value of the first pattern that fits the end of `module`, as peft reads rank_pattern."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def named(module: str, names: Iterable[str]) -> bool:
    """Whether `module` is one of `names` or ends with one at a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def inside(module: str, names: Iterable[str]) -> bool:
    """Whether a run of whole path elements of `module` is one of `names` (as modules_to_save)."""
    return any(f".{name}." in f".{module}." for name in names)


def layer_index(module: str, patterns: Iterable[str]) -> int | None:
    """The layer number in a module's path, as peft finds it for layers_to_transform."""
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for expression in expressions:
        if found := re.match(expression, module):
            return int(found.group(1))
    return None
