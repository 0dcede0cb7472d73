"""Budgets as they are written on the command line."""

from __future__ import annotations

import pytest

from exporter.core.errors import InputRefused, WrongUsage
from exporter.pipeline.budget import Budget, parse_size, read_budget


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("300MB", 300_000_000),
        ("1.5 gb", 1_500_000_000),
        ("280MiB", 280 * 2**20),
        ("123456", 123_456),
        ("4096B", 4096),
        ("0.3", 300),
        ("1", 1000),
        ("1.0", 1000),
    ],
)
def test_sizes(text: str, limit: int) -> None:
    assert parse_size(text).limit(1000) == limit


@pytest.mark.parametrize("text", ["", "0", "-3MB", "MB", "3 apples", "1e9", "0.3MBB", "nan", "0MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(WrongUsage, match="--max-size"):
        parse_size(text)


def test_budgets_are_for_mixed_schemes_only() -> None:
    assert read_budget(None, None, mixed=False) == Budget()
    for size, kl in (("1MB", None), (None, 0.1)):
        with pytest.raises(WrongUsage, match="--scheme mixed"):
            read_budget(size, kl, mixed=False)


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan"), float("inf")])
def test_a_kl_budget_is_positive(kl: float) -> None:
    with pytest.raises(WrongUsage, match="--max-kl"):
        read_budget(None, kl, mixed=True)


def test_limits() -> None:
    assert Budget().limit(1000, 400, 300) == 400
    assert Budget(kl=0.1).limit(1000, 400, 300) is None
    assert read_budget("0.35", 0.1, mixed=True).limit(1000, 400, 300) == 350
    with pytest.raises(InputRefused, match=r"0.00 MB \(0.3 of float16\); allow at least that"):
        read_budget("0.29", None, mixed=True).limit(1000, 400, 300)
