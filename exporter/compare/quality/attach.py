"""Which finding or device a side, a severity or a measurement belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exporter.compare.quality.lexicon import Match
from exporter.compare.quality.scope import Clauses

MAX_GAP_WORDS = 6


def owner_of(
    sentence: str,
    clauses: Clauses,
    attribute: Match,
    mentions: Sequence[Match],
    terms: Sequence[Match],
    breaks: frozenset[str],
) -> Match | None:
    """The mention that `attribute` describes, or None when the sentence has none.

    In order: the noun phrase it opens ("left pleural effusion"), the last mention before it in its
    clause ("effusion on the left"), the next one in its clause ("on the left an effusion"), the
    last one before it in the sentence, the first one after it.
    """
    inside = [m for m in mentions if m.start <= attribute.start and attribute.end <= m.end]
    if inside:
        return inside[0]
    before = [m for m in mentions if m.end <= attribute.start]
    after = [m for m in mentions if m.start >= attribute.end]
    if after and _one_phrase(sentence, attribute, after[0], terms, breaks):
        return after[0]
    clause = clauses.index(attribute.start)
    near_before = [m for m in before if clauses.index(m.start) == clause]
    near_after = [m for m in after if clauses.index(m.start) == clause]
    for group, place in ((near_before, -1), (near_after, 0), (before, -1), (after, 0)):
        if group:
            return group[place]
    return None


def anatomy_of(
    sentence: str, clauses: Clauses, attribute: Match, anatomy: Sequence[Match]
) -> str | None:
    """The structure that `attribute` describes where no finding does ("right kidney", "aorta 52 mm")."""
    clause = clauses.index(attribute.start)
    near = [a for a in anatomy if clauses.index(a.start) == clause]
    following = [a for a in near if a.start >= attribute.end]
    if following and not re.search(r"[,;()]", sentence[attribute.end : following[0].start]):
        return following[0].concept
    preceding = [a for a in near if a.end <= attribute.start]
    return preceding[-1].concept if preceding else None


def _one_phrase(
    sentence: str,
    attribute: Match,
    mention: Match,
    terms: Sequence[Match],
    breaks: frozenset[str],
) -> bool:
    """Whether only adjectives stand between the attribute and the mention."""
    gap = sentence[attribute.end : mention.start]
    covered = [t for t in terms if attribute.end <= t.start and t.end <= mention.start]
    for term in sorted(covered, key=lambda t: -t.start):
        place = slice(term.start - attribute.end, term.end - attribute.end)
        gap = gap[: place.start] + ("*" if term.kind == attribute.kind else " ") + gap[place.stop :]
    # "left and right effusions", "mild to moderate edema": joined adjectives are one.
    gap = re.sub(r"^\s*(?:,\s*|(?:and|or|to|greater than|more than)\s+)?\*", " ", gap)
    if re.search(r"[,;:()*]", gap):
        return False
    words = re.findall(r"\w+", gap)
    return len(words) <= MAX_GAP_WORDS and not breaks.intersection(words)
