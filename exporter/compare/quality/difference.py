"""Paired difference of two captions' facts: kept, lost, added, flipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from exporter.compare.quality.facts import ATTRIBUTES, Extraction, Fact, Statement

KEPT, LOST, ADDED, FLIPPED = "kept", "lost", "added", "flipped"


@dataclass(frozen=True)
class Change:
    """What became of one fact; `before` is None for an added one, `after` for a lost one."""

    outcome: str
    before: Fact | None
    after: Fact | None

    @property
    def kind(self) -> str:
        """The kind of fact concerned."""
        fact = self.before or self.after
        return fact.kind if fact else ""

    @property
    def swapped(self) -> bool:
        """Whether one device took the place of another."""
        if self.before is None or self.after is None or self.kind != "device":
            return False
        return self.before.subject != self.after.subject

    @property
    def text(self) -> str:
        """One line, such as "laterality of nodule: left -> right"."""
        fact = self.before or self.after
        if fact is None:
            return ""
        old = self.before.value if self.before else "nothing"
        new = self.after.value if self.after else "nothing"
        if self.swapped and self.before and self.after:
            return f"device: {self.before.subject} -> {self.after.subject}"
        of = f" of {fact.subject}" if fact.kind in ATTRIBUTES and fact.subject else ""
        name = fact.subject if fact.kind in ("finding", "device") else f"{fact.kind}{of}"
        return f"{name}: {old} -> {new}" if self.outcome != KEPT else f"{name}: {old}"


def compare_facts(reference: Extraction, candidate: Extraction) -> tuple[Change, ...]:
    """What became of each fact of `reference`, and what `candidate` adds.

    Statements of one concept are paired so that most of their facts agree; a device left over on
    both sides is a swapped device. Flipped are, within a pair: another status (only between absent
    and present or possible), another side, severity or measurement, another device; and another modality.
    """
    changes = _loose(reference.loose, candidate.loose)
    pairs, old, new = _pair(reference.statements, candidate.statements)
    for before, after in pairs:
        changes += _statement(before, after)
    lost_devices = [s for s in old if s.kind == "device" and s.status != "absent"]
    added_devices = [s for s in new if s.kind == "device" and s.status != "absent"]
    for before, after in zip(lost_devices, added_devices, strict=False):
        changes += _statement(before, after)
        old.remove(before)
        new.remove(after)
    for lost in old:
        first, *rest = lost.facts()
        denied = _denial(lost, candidate.statements)
        changes.append(Change(FLIPPED if denied else LOST, first, denied))
        changes += [Change(LOST, f, None) for f in rest]
    for added in new:
        first, *rest = added.facts()
        denied = _denial(added, reference.statements)
        changes.append(Change(FLIPPED if denied else ADDED, denied, first))
        changes += [Change(ADDED, None, f) for f in rest]
    return tuple(changes)


def _denial(left: Statement, other: Sequence[Statement]) -> Fact | None:
    """What the other caption says against a statement that has no partner there.

    "Normal. No abnormality" in one caption and "normal. Abnormality" in the other: the pair that is
    left over contradicts what was said, unless the other caption says the same too, or speaks of
    another side.
    """
    same = [s for s in other if s.concept == left.concept]
    opposite = {"present": "absent", "possible": "absent", "absent": "present"}.get(left.status)
    if any(s.status == left.status for s in same):
        return None
    sides = left.values("laterality")
    for statement in same:
        apart = (
            sides and statement.values("laterality") and not sides & statement.values("laterality")
        )
        if statement.status == opposite and not apart:
            return statement.facts()[0]
    return None


def _loose(reference: Sequence[Fact], candidate: Sequence[Fact]) -> list[Change]:
    changes: list[Change] = []
    slots = dict.fromkeys((f.kind, f.subject) for f in (*reference, *candidate))
    for slot in slots:
        before = [f for f in reference if (f.kind, f.subject) == slot]
        after = [f for f in candidate if (f.kind, f.subject) == slot]
        # Another organ is not a contradiction, another modality or side of the organ is.
        changes += _slot(before, after, flips=slot[0] != "anatomy")
    return changes


def _slot(before: Iterable[Fact], after: Iterable[Fact], *, flips: bool) -> list[Change]:
    """Compare the values of one slot; what is left on both sides is flipped or lost and added."""
    old, new = {f.value: f for f in before}, {f.value: f for f in after}
    changes = [Change(KEPT, old[v], new[v]) for v in old if v in new]
    left = [f for v, f in old.items() if v not in new]
    right = [f for v, f in new.items() if v not in old]
    if flips:
        changes += [Change(FLIPPED, a, b) for a, b in zip(left, right, strict=False)]
        both = min(len(left), len(right))
        left, right = left[both:], right[both:]
    changes += [Change(LOST, f, None) for f in left]
    changes += [Change(ADDED, None, f) for f in right]
    return changes


def _statement(before: Statement, after: Statement) -> list[Change]:
    old, new = before.facts(), after.facts()
    # Doubt and history change a statement; only its denial turns it over.
    hedged = "absent" not in {before.status, after.status} or "past" in {
        before.status,
        after.status,
    }
    if before.concept != after.concept:
        changes = [Change(FLIPPED, old[0], new[0])]
    else:
        changes = _slot(old[:1], new[:1], flips=not hedged)
    for name in ATTRIBUTES:
        changes += _slot(
            [f for f in old if f.kind == name], [f for f in new if f.kind == name], flips=True
        )
    return changes


def _pair(
    reference: Sequence[Statement], candidate: Sequence[Statement]
) -> tuple[list[tuple[Statement, Statement]], list[Statement], list[Statement]]:
    """Greedy pairing within a concept, best agreement first; returns pairs and both remainders."""
    scored = [
        (_agreement(a, b), -i, -j, a, b)
        for i, a in enumerate(reference)
        for j, b in enumerate(candidate)
        if (a.kind, a.concept) == (b.kind, b.concept)
    ]
    scored.sort(key=lambda row: row[:3], reverse=True)
    old, new = list(range(len(reference))), list(range(len(candidate)))
    pairs: list[tuple[Statement, Statement]] = []
    for _, i, j, a, b in scored:
        if -i in old and -j in new:
            old.remove(-i)
            new.remove(-j)
            pairs.append((a, b))
    return pairs, [reference[i] for i in old], [candidate[j] for j in new]


def _agreement(a: Statement, b: Statement) -> int:
    same = sum(len(a.values(n) & b.values(n)) for n in ATTRIBUTES)
    return 2 * same + (a.status == b.status)


@dataclass(frozen=True)
class FactCounts:
    """How many facts became what; with ground truth as the reference, recall and precision.

    total: facts that the reference states; stated: facts that the candidate states.
    """

    kept: int
    lost: int
    added: int
    flipped: int
    total: int
    stated: int


def count_changes(changes: Iterable[Change]) -> FactCounts:
    """Count the outcomes of one image. One fact may be turned over twice but is counted once."""
    listed = tuple(changes)
    outcomes = [c.outcome for c in listed]
    return FactCounts(
        kept=outcomes.count(KEPT),
        lost=outcomes.count(LOST),
        added=outcomes.count(ADDED),
        flipped=outcomes.count(FLIPPED),
        total=len({c.before for c in listed if c.before}),
        stated=len({c.after for c in listed if c.after}),
    )


def add_counts(counts: Iterable[FactCounts]) -> FactCounts:
    """The sum over images."""
    columns = list(zip(*(astuple(c) for c in counts), strict=True))
    return FactCounts(*(sum(column) for column in columns)) if columns else FactCounts(*[0] * 6)
