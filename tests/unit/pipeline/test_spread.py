"""A limited run sees every modality, evenly over the set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from exporter.core.cases import Case
from exporter.pipeline.evaluation import spread


def cases(modalities: list[str]) -> list[Case]:
    return [Case(str(i), Path("x"), str(i), m, None) for i, m in enumerate(modalities)]


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(0, 50))
def test_spread(modalities: list[str], limit: int) -> None:
    given_cases = cases(modalities)
    found = spread(given_cases, limit)
    assert len({c.id for c in found}) == len(found)
    if not limit or limit >= len(modalities):
        assert list(found) == given_cases
        return
    assert len(found) <= limit
    whole, part = Counter(modalities), Counter(c.modality for c in found)
    if limit >= len(whole):
        assert part.keys() == whole.keys()
    share = -(-limit // len(whole))
    assert all(part[m] <= share for m in whole)
