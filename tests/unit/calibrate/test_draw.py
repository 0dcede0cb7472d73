"""Draws are balanced, repeatable and spread over patients."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from exporter.calibrate.draw import draw_cases
from exporter.core.cases import Case
from exporter.core.errors import InputRefused


def made(modality: str, count: int, patients: int) -> list[Case]:
    return [
        Case(f"{modality}{i}", Path("x"), f"{modality}-p{i % patients}", modality, None)
        for i in range(count)
    ]


CASES = [*made("x-ray", 60, 6), *made("ct", 12, 12), *made("mri", 3, 1)]


def test_modalities_get_the_same_share() -> None:
    drawn = draw_cases(CASES, 24)
    assert Counter(c.modality for c in drawn) == {"mri": 3, "ct": 11, "x-ray": 10}
    assert Counter(c.modality for c in draw_cases(CASES, 9)) == {"mri": 3, "ct": 3, "x-ray": 3}
    assert len(set(drawn)) == 24


def test_patients_come_once_before_any_comes_twice() -> None:
    patients = Counter(c.patient for c in draw_cases(made("x-ray", 60, 6), 8))
    assert sorted(patients.values()) == [1, 1, 1, 1, 2, 2]


def test_draws_depend_on_the_seed_and_not_on_the_order() -> None:
    one = draw_cases(CASES, 10, seed=1)
    assert one == draw_cases(CASES[::-1], 10, seed=1)
    assert set(one) != set(draw_cases(CASES, 10, seed=2))
    assert one == draw_cases(CASES, 20, seed=1)[:10]


def test_small_sets_are_taken_whole() -> None:
    assert set(draw_cases(CASES, 500)) == set(CASES)
    with pytest.raises(InputRefused, match="no cases"):
        draw_cases([], 5)
    with pytest.raises(ValueError, match="0 cases"):
        draw_cases(CASES, 0)
