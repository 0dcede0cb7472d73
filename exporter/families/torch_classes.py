"""Finds the torch class of a model: one of transformers, or one of a family's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from exporter.families.table import FAMILIES, TASK_FAMILIES, family_of, task_family_of


def class_name(config: Mapping[str, Any]) -> str:
    """What ``architectures`` in a parsed config.json holds. Raises `InputRefused` for no known family."""
    return _declared(config).rpartition(":")[2]


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether transformers has no class for a parsed config.json and the family brings one."""
    kind = config.get("model_type")
    tables = [f.TORCH_CLASSES for f in FAMILIES.values()]
    tables += [f.TORCH_CLASSES for f in TASK_FAMILIES.values()]
    return any(":" in table.get(str(kind), "") for table in tables)


def torch_class(config: Mapping[str, Any]) -> Any:
    """The class itself; imports torch and transformers."""
    module, _, name = _declared(config).rpartition(":")
    return getattr(import_module(module or "transformers"), name)


def _declared(config: Mapping[str, Any]) -> str:
    family = task_family_of(config) or family_of(config)
    classes, kind = family.TORCH_CLASSES, str(config["model_type"])
    # A model_type whose classes differ by their head has them by their own names too.
    named = [name for name in config.get("architectures") or [] if name in classes]
    return classes[named[0] if len(named) == 1 else kind]
