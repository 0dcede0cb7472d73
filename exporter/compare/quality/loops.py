"""Captions that got stuck: the same words over and over."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 16
TURNS, SPAN = 3, 12


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether a run of up to 16 tokens stands at least 3 times in a row, 12 tokens in all.

    "no effusion, no nodule, no mass" repeats words but no run; ten equal digits are below the span.
    """
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // TURNS) + 1):
        needed = max(TURNS * period, SPAN) - period
        run = 0
        for index in range(period, len(tokens)):
            run = run + 1 if tokens[index] == tokens[index - period] else 0
            if run >= needed:
                return True
    return False
