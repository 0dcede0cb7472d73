"""Which family a config.json is of. A family is a file in `captioners` or `task_models`, found by its place.

The file's name is the family's name in profiles; what it has to hold say the protocols `base.Family` and
`tasks.TaskFamily`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.families import captioners, task_models
from exporter.families.base import Family, KnownFamily
from exporter.families.tasks import TaskFamily


def _files(room: ModuleType) -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(room.__path__))
    return {name: import_module(f"{room.__name__}.{name}") for name in names}


FAMILIES = {name: cast(Family, file) for name, file in _files(captioners).items()}
TASK_FAMILIES = {name: cast(TaskFamily, file) for name, file in _files(task_models).items()}
ALL_FAMILIES: dict[str, KnownFamily] = {**FAMILIES, **TASK_FAMILIES}


def family_of(config: Mapping[str, Any]) -> Family:
    """The captioning family of a parsed config.json by its model_type. Raises `InputRefused`."""
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.MODEL_TYPES:
            return family
    known = sorted(t for f in FAMILIES.values() for t in f.MODEL_TYPES)
    raise InputRefused(
        f"config.json: model_type {kind!r} is of no known family; known: {', '.join(known)}"
    )


def task_family_of(config: Mapping[str, Any]) -> TaskFamily | None:
    """The task family of a parsed config.json by its model_type; None where it is no such model."""
    kind = config.get("model_type")
    for family in TASK_FAMILIES.values():
        if kind in family.MODEL_TYPES:
            return family
    return None


def required_task_family(config: Mapping[str, Any]) -> TaskFamily:
    """The task family of a parsed config.json. Raises `InputRefused` where it is no such model."""
    family = task_family_of(config)
    if family is None:
        raise InputRefused(
            f"config.json: model_type {config.get('model_type')!r} is of no task family; expected a "
            "zero-shot, segmentation, text or summary model"
        )
    return family


def config_defaults(family: str) -> Mapping[str, Value]:
    """What a family's config class puts where config.json has no key; nothing for an unknown family."""
    known = ALL_FAMILIES.get(family)
    return {} if known is None else known.CONFIG_DEFAULTS
