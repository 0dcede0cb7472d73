"""Draws calibration cases: the same ones from the same set, number and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from exporter.core.cases import Case
from exporter.core.errors import InputRefused


def draw_cases(cases: Sequence[Case], count: int, *, seed: int = 0) -> tuple[Case, ...]:
    """`count` cases, as many of each modality as there are, and of as many patients as there are.

    All of them when the set has no more. The order of the set does not matter: cases are ranked by
    a hash of seed and id. Raises `InputRefused` for an empty set, ValueError when `count` < 1.
    """
    if count < 1:
        raise ValueError(f"{count} cases; expected at least one")
    if not cases:
        raise InputRefused("the calibration set has no cases; expected at least one")
    ranked = sorted(cases, key=lambda c: (_rank(c.id, seed), c.id))
    queues = {m: _patients_first(ranked, m) for m in sorted({c.modality for c in cases})}
    chosen: list[Case] = []
    while len(chosen) < min(count, len(cases)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return tuple(chosen)


def _patients_first(ranked: Sequence[Case], modality: str) -> list[Case]:
    """Cases of one modality, the next at the end: every patient's first before any's second."""
    seen: dict[str, int] = {}
    rounds: list[tuple[int, Case]] = []
    for case in ranked:
        if case.modality == modality:
            rounds.append((seen.get(case.patient, 0), case))
            seen[case.patient] = seen.get(case.patient, 0) + 1
    rounds.sort(key=lambda r: r[0])
    return [case for _, case in reversed(rounds)]


def _rank(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
