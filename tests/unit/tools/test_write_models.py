"""docs/models.md is what its script writes, and the tests that it names exist."""

from __future__ import annotations

import re

from exporter.catalog.profiles import find_model, model_profiles
from exporter.families.table import FAMILIES, TASK_FAMILIES
from tests.support.family_cases import CASES
from tests.support.task_cases import CASES as TASK_CASES
from tools.write_models import (
    APART,
    CONTRACT,
    NO_ADAPTER,
    NO_PADDING,
    ONE_LAYOUT,
    PAGE,
    PROOFS,
    ROOT,
    TASK_CONTRACT,
    TASK_PROOFS,
    calibrated,
    case_of,
    render,
    task_case_of,
)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tools/write_models.py"


def test_every_working_model_has_a_row_in_the_contract() -> None:
    rows = {case.name for case in CASES}
    used = set()
    for name in model_profiles():
        profile = find_model(name)
        if profile.status == "plan-only":
            assert profile.family not in FAMILIES
            continue
        if profile.family in TASK_FAMILIES:
            assert task_case_of(profile) in {case.name for case in TASK_CASES}, name
            continue
        assert case_of(profile) in rows, name
        used.add(case_of(profile))
    assert used == rows, "a row of the contract stands for no profile"


def test_what_a_row_lacks_is_said() -> None:
    for profile in map(find_model, model_profiles()):
        if profile.family not in TASK_FAMILIES:
            continue
        (case,) = [c for c in TASK_CASES if c.name == task_case_of(profile)]
        assert (case.name in NO_ADAPTER) == (not case.targets), case.name
        assert (case.name in NO_PADDING) == (case.padded is None), case.name


def test_rows_of_one_key_layout_are_those_that_it_names() -> None:
    assert {case.name for case in CASES if not case.keys} == set(ONE_LAYOUT)


def test_every_published_recipe_is_trained_by_its_row() -> None:
    rows, found = {case.name: case for case in CASES}, set()
    for profile in map(find_model, model_profiles()):
        if profile.adapter is None:
            continue
        assert rows[case_of(profile)].recipe == profile.adapter, profile.name
        found.add(case_of(profile))
    ours = {case.name for case in CASES if not isinstance(case.adapter, str)}
    assert found == rows.keys() - ours


def test_the_tests_it_names_exist() -> None:
    named = [(CONTRACT, PROOFS.values()), (TASK_CONTRACT, TASK_PROOFS.values()), *APART.values()]
    for path, tests in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for test in tests:
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), test
    for name in model_profiles():
        path, _, test = calibrated(find_model(name)).split(" ")[0].partition("::")
        if path.startswith("tests/"):
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_calibrated_column_says_what_the_code_refuses() -> None:
    """A model without a row of it is one whose decoder calibration does not walk."""
    for profile in map(find_model, model_profiles()):
        if profile.family in TASK_FAMILIES or profile.status == "plan-only":
            continue
        walked = profile.schemes["int4"] == "int4-gptq"
        assert calibrated(profile).startswith("tests/" if walked else "refused: "), profile.name
