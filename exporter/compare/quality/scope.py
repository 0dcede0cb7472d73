"""Which mentions a negation or a doubt governs, after NegEx (Chapman 2001) and ConText (Harkema 2009).

A trigger before reaches forward to the end of its clause, a trigger after reaches five words back;
pseudo-triggers ("no change in") hide the word they contain. Where a clause ends is decided by
termination words and by a comma or an "and" that starts something new.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.compare.quality.lexicon import Match, trigger_matcher

BACKWARD_WORDS = 5
# "no pneumothorax and a nodule", "no effusion, the heart is large", "no mass with mild edema",
# "no flow, suggesting torsion"
_NEW_PART = re.compile(
    r"(?:[,:]?\s+(?:and|with|plus)\s+|,\s+)(?:(?:also|then|now)\s+)?"
    r"(?=(?:an?|the|there|this|it|on|in|at|with|without|no|its)\s)"
    r"|,\s+(?=(?:suggest|consistent|compatible|concerning|suspicious|indicat|represent|likely|"
    r"possibl|probabl|presum|diagnostic|in keeping))"
)
_LIST_GOES_ON = re.compile(r"^[^;.]*?\b(?:or|nor)\b")
_HARD = re.compile(r"[;()\n]|:\s|\s[-–—]\s")


@dataclass(frozen=True)
class Clauses:
    """One sentence cut into clauses, with the triggers in it."""

    starts: tuple[int, ...]
    triggers: tuple[Match, ...]

    def index(self, position: int) -> int:
        """Number of the clause that holds `position`."""
        return sum(1 for s in self.starts if s <= position)


def split_clauses(sentence: str, terms: Sequence[Match], path: Path | None = None) -> Clauses:
    """Find the clause starts and the triggers of one lowercase sentence."""
    triggers = tuple(trigger_matcher(path).find(sentence))
    starts = {t.start for t in triggers if t.kind == "end"}
    starts |= {m.start() for m in _HARD.finditer(sentence)}
    starts |= {m.start() for m in _NEW_PART.finditer(sentence)}
    for term in terms:
        if term.kind not in ("laterality", "severity", "measurement"):
            continue
        head = re.search(r"(?:,|\band|\bwith|\bplus)\s+$", sentence[: term.start])
        # "no consolidation, large effusion or nodule" is one list; without the "or" a comma
        # before an adjective starts a new statement.
        if head and not _LIST_GOES_ON.match(sentence[term.end :]):
            starts.add(head.start())
    return Clauses(tuple(sorted(starts)), triggers)


def status_of(sentence: str, clauses: Clauses, mention: Match) -> str:
    """present, absent, possible or past, for a mention in that sentence."""
    statuses = {
        _STATUS[t.kind] for t in clauses.triggers if t.kind in _STATUS
        and _governs(sentence, clauses, t, mention)
    }  # fmt: skip
    if "doubt after" in statuses:
        return "possible"
    if "absent" in statuses:
        return "absent"
    if "past" in statuses:
        return "past"
    return "possible" if "doubt" in statuses else "present"


_STATUS = {
    "before": "absent",
    "after": "absent",
    "maybe_before": "doubt",
    "maybe_after": "doubt after",
    "maybe_between": "doubt",
    "past_before": "past",
}


def _governs(sentence: str, clauses: Clauses, trigger: Match, mention: Match) -> bool:
    if mention.start <= trigger.start and trigger.end <= mention.end:
        return trigger.kind == "before"  # "heart is not enlarged"
    if trigger.kind.endswith("before") or (
        trigger.kind == "maybe_between" and mention.start >= trigger.end
    ):
        inside = mention.start >= trigger.end
        return inside and clauses.index(mention.start) == clauses.index(trigger.end)
    if mention.end > trigger.start:
        return False
    # A trigger after starts a clause of its own when it contains an end word; compare what precedes.
    between = sentence[mention.end : trigger.start]
    if clauses.index(mention.start) != clauses.index(max(trigger.start - 1, 0)):
        return False
    if len(re.findall(r"\w+", between)) > BACKWARD_WORDS:
        return False
    plural = re.match(r"(?:are|were|have)\b", sentence[trigger.start :]) is not None
    return plural or not re.search(r",|\band\b|\bwith\b", between)
