"""Families are found by their place, and each file holds what the protocols ask for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from exporter.core.errors import InputRefused
from exporter.families import captioners, task_models
from exporter.families.base import Family, KnownFamily
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.table import (
    ALL_FAMILIES,
    FAMILIES,
    TASK_FAMILIES,
    config_defaults,
    family_of,
    required_task_family,
    task_family_of,
)
from exporter.families.tasks import TaskFamily

KINDS = [(name, kind) for name, family in ALL_FAMILIES.items() for kind in family.MODEL_TYPES]


def asked(protocol: Any) -> set[str]:
    """Names that a module of `protocol` has to have."""
    return {
        name
        for base in protocol.__mro__
        for name in {*getattr(base, "__annotations__", {}), *vars(base)}
        if not name.startswith("_")
    }


@pytest.mark.parametrize("room", [captioners, task_models])
def test_every_file_of_a_room_is_a_family(room):
    files = {p.stem for p in Path(room.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == set(FAMILIES if room is captioners else TASK_FAMILIES)


@pytest.mark.parametrize("name", sorted(ALL_FAMILIES))
def test_a_family_has_all_names_of_its_protocol(name):
    protocol = Family if name in FAMILIES else TaskFamily
    family = ALL_FAMILIES[name]
    assert asked(KnownFamily) < asked(protocol)
    assert not asked(protocol) - set(vars(family))
    for wanted in asked(protocol):
        if inspect.isfunction(getattr(protocol, wanted, None)):
            # Without the protocol's self.
            names = list(inspect.signature(getattr(protocol, wanted)).parameters)[1:]
            found = list(inspect.signature(getattr(family, wanted)).parameters)
            assert len(found) == len(names), wanted


@pytest.mark.parametrize("name", sorted(ALL_FAMILIES))
def test_what_a_family_declares_is_of_its_own_model_types(name):
    family = ALL_FAMILIES[name]
    assert family.MODEL_TYPES
    assert set(family.PUBLISHED) <= set(family.MODEL_TYPES)
    assert set(family.SHAPES) <= set(family.MODEL_TYPES)
    assert all(isinstance(layout, Layout) for layout in family.LAYOUTS)
    assert all(isinstance(layout, PublishedLayout) for layout in family.PUBLISHED.values())
    assert set(family.MODEL_TYPES) <= {k for layout in family.LAYOUTS for k in layout.model_types}


def test_a_model_type_belongs_to_one_family():
    kinds = [kind for _, kind in KINDS]
    assert len(kinds) == len(set(kinds))
    assert not FAMILIES.keys() & TASK_FAMILIES.keys()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_config_finds_its_family(name, kind):
    config = {"model_type": kind}
    if name in FAMILIES:
        assert family_of(config) is FAMILIES[name]
        assert task_family_of(config) is None
    else:
        assert required_task_family(config) is TASK_FAMILIES[name]


def test_an_unknown_model_type_is_refused_with_those_known():
    with pytest.raises(InputRefused, match=r"'bloom' is of no known family; known: .*smolvlm"):
        family_of({"model_type": "bloom"})
    with pytest.raises(InputRefused, match="'bloom' is of no task family"):
        required_task_family({"model_type": "bloom"})
    assert config_defaults("bloom") == {}
