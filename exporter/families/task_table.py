"""The families that do other things than caption. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from exporter.core.errors import InputRefused
from exporter.families import (
    bert,
    biomedclip,
    biomedclipseg,
    clip,
    clipseg,
    cris,
    medbridge,
    medclip,
    medfilip,
    t5,
)
from exporter.families.tasks import TaskFamily

TASK_FAMILIES: dict[str, TaskFamily] = {
    "clip": cast(TaskFamily, clip),
    "clipseg": cast(TaskFamily, clipseg),
    "cris": cast(TaskFamily, cris),
    "t5": cast(TaskFamily, t5),
    "bert": cast(TaskFamily, bert),
    "biomedclip": cast(TaskFamily, biomedclip),
    "biomedclipseg": cast(TaskFamily, biomedclipseg),
    "medclip": cast(TaskFamily, medclip),
    "medfilip": cast(TaskFamily, medfilip),
    "medbridge": cast(TaskFamily, medbridge),
}


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
