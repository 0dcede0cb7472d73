"""Which finding or device a side, a severity or a measurement belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.compare.quality.lexicon import Match
from exporter.compare.quality.scope import Clauses

MAX_GAP_WORDS = 6
# "The aorta measures up to 29 mm": all that may stand between an organ and its own size.
_SIZE_WORDS = re.compile(
    r"(?:\s|,|\b(?:is|are|was|were|has|have|had|an?|the|of|in|at|to|up|about|approximately|size|"
    r"diameter|width|length|volume|caliber|calibre|thickness|height|depth|span|pressure|systolic|"
    r"measures?|measured|measuring|estimated|holds|contains|maximum|maximal|mean|greatest)\b)*"
)
_SAYS_SOMETHING = re.compile(r"\d|\b(?:is|are|was|were|measures?|appears?|remains?)\b")
_SHOWS = re.compile(r"\s*(?:show|reveal|demonstrat|there\b)")
# "A mass displacing the right kidney": the side of what is pushed away, not of what pushes.
_PUSHES = re.compile(r"\b(?:displac|compress|effac|indent|push|deviat)(?:es|ing|s)\b")
# "Compression of the left bronchus by an enlarged atrium": what follows is the cause.
_CAUSE = re.compile(r"\b(?:by|from|because of|due to|secondary to|caused by|owing to)\b")
# "No flow in the left testis, compatible with torsion": what follows is what it means.
_MEANS = re.compile(
    r"\s*,?\s*(?:compatible|consistent|suggest|in keeping|indicat|diagnostic|concerning|suspicious)"
)


@dataclass(frozen=True)
class Sentence:
    """One lowercase sentence with its terms; `mentions` are its findings and devices."""

    text: str
    clauses: Clauses
    terms: Sequence[Match]
    breaks: frozenset[str]

    @property
    def mentions(self) -> list[Match]:
        """Findings and devices, in order."""
        return [t for t in self.terms if t.kind in ("finding", "device")]

    def clause(self, position: int) -> tuple[int, int]:
        """Start and end of the clause that holds `position`."""
        before = [s for s in self.clauses.starts if s <= position]
        after = [s for s in self.clauses.starts if s > position]
        return (before[-1] if before else 0), (after[0] if after else len(self.text))


def owner_of(sentence: Sentence, attribute: Match) -> Match | None:
    """The finding, device or organ that `attribute` describes, or None when none does.

    In order: the noun phrase it opens ("left pleural effusion"), the last mention before it in its
    clause ("effusion on the left"), the organ whose size it is ("the aorta measures 29 mm"), the
    next mention in its clause ("on the left an effusion"), and then another clause's.
    """
    mentions = sentence.mentions
    inside = [m for m in mentions if m.start <= attribute.start and attribute.end <= m.end]
    if inside:
        return inside[0]
    before = [m for m in mentions if m.end <= attribute.start]
    after = [m for m in mentions if m.start >= attribute.end]
    while len(after) > 1 and sentence.text[after[0].end : after[1].start] == " ":
        after = after[1:]  # "6 mm calcified granuloma": the noun, not its adjective
    if after and _one_phrase(sentence, attribute, after[0]):
        return after[0]
    start, end = sentence.clause(attribute.start)
    near_before = [m for m in before if m.start >= start]
    near_after = [m for m in after if m.start < end]
    if near_before:
        between = sentence.text[near_before[-1].end : attribute.start]
        pushed = attribute.kind == "laterality" and _PUSHES.search(between)
        return organ_of(sentence, attribute) if pushed else near_before[-1]
    return (
        _measured_organ(sentence, attribute)
        or (_unless_cause(sentence, attribute, near_after[0]) if near_after else None)
        or _in_other_clause(sentence, attribute, before, after)
    )


def _unless_cause(sentence: Sentence, attribute: Match, mention: Match) -> Match:
    """The mention that follows, or the organ in between where the mention is its cause."""
    organ = organ_of(sentence, attribute) if attribute.kind == "laterality" else None
    cause = _CAUSE.search(sentence.text[attribute.end : mention.start])
    return organ if organ is not None and cause else mention


def organ_of(sentence: Sentence, attribute: Match) -> Match | None:
    """The organ in its clause that `attribute` describes where no finding does ("right kidney")."""
    start, end = sentence.clause(attribute.start)
    near = [t for t in sentence.terms if t.kind == "anatomy" and start <= t.start < end]
    following = [a for a in near if a.start >= attribute.end or a.start == attribute.start]
    if following and not re.search(r"[,;()]", sentence.text[attribute.end : following[0].start]):
        return following[0]
    preceding = [a for a in near if a.end <= attribute.start]
    return preceding[-1] if preceding else None


def _measured_organ(sentence: Sentence, attribute: Match) -> Match | None:
    if attribute.kind != "measurement":
        return None
    start, _ = sentence.clause(attribute.start)
    organs = [
        t
        for t in sentence.terms
        if t.kind == "anatomy" and start <= t.start and t.end <= attribute.start
    ]
    if organs and _SIZE_WORDS.fullmatch(sentence.text[organs[-1].end : attribute.start]):
        return organs[-1]
    return None


def _in_other_clause(
    sentence: Sentence, attribute: Match, before: Sequence[Match], after: Sequence[Match]
) -> Match | None:
    """As in "the left lung shows an opacity", "nodule, 8 mm, left lung", "right kidney 9 cm"."""
    start, end = sentence.clause(attribute.start)
    if after and _SHOWS.match(sentence.text[end:]):
        return after[0]
    organ = organ_of(sentence, attribute)
    rest = sentence.text[start : attribute.start] + sentence.text[attribute.end : end]
    if attribute.kind == "laterality" and organ is not None:
        if before:
            taken = ";" in sentence.text[before[-1].end : attribute.start]
            taken = taken or _has_side(sentence, before[-1])
        else:
            said = _SAYS_SOMETHING.search(rest) or _MEANS.match(sentence.text[end:])
            taken = said is not None or (bool(after) and _has_side(sentence, after[0]))
        if taken:
            return organ
    if before and not (after and ";" in sentence.text[before[-1].end : attribute.start]):
        return before[-1]
    return after[0] if after else None


def _has_side(sentence: Sentence, mention: Match) -> bool:
    """Whether the mention's own clause names a side."""
    start, end = sentence.clause(mention.start)
    return any(t.kind == "laterality" and start <= t.start < end for t in sentence.terms)


def _one_phrase(sentence: Sentence, attribute: Match, mention: Match) -> bool:
    """Whether only adjectives stand between the attribute and the mention."""
    if attribute.kind == "laterality" and re.search(
        r"\bon the $", sentence.text[: attribute.start]
    ):
        return False  # "effusion on the left and bibasilar atelectasis": a side as a noun
    gap = sentence.text[attribute.end : mention.start]
    covered = [t for t in sentence.terms if attribute.end <= t.start and t.end <= mention.start]
    for term in sorted(covered, key=lambda t: -t.start):
        place = slice(term.start - attribute.end, term.end - attribute.end)
        gap = gap[: place.start] + ("*" if term.kind == attribute.kind else " ") + gap[place.stop :]
    # "left and right effusions", "mild to moderate edema": joined adjectives are one.
    gap = re.sub(r"^\s*(?:,\s*|(?:and|or|to|greater than|more than)\s+)?\*", " ", gap)
    if re.search(r"[,;:()*]", gap):
        return False
    words = re.findall(r"\w+", gap)
    return len(words) <= MAX_GAP_WORDS and not sentence.breaks.intersection(words)
