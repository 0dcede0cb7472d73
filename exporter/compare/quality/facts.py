"""Clinical facts that an English caption states, by rules and a lexicon, with their places.

A *statement* is a finding or a device with its status, sides, severity and measurements; what
belongs to none (modality, anatomy, the side of an organ) is global. `facts` are the atoms of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exporter.compare.quality.attach import anatomy_of, owner_of
from exporter.compare.quality.lexicon import Lexicon, Match, read_lexicon, term_matcher
from exporter.compare.quality.measure import find_measurements
from exporter.compare.quality.scope import split_clauses, status_of

KINDS = ("modality", "anatomy", "finding", "device", "laterality", "severity", "measurement")
ATTRIBUTES = ("laterality", "severity", "measurement")
_SENTENCE = re.compile(
    r"(?:(?<=[.!?])(?<!fig\.)(?<!approx\.)(?<!dr\.)(?<!vs\.)(?<!e\.g\.)(?<!i\.e\.)\s+|\n+)"
)
_REFERS_BACK = re.compile(r"^(?:it|they|this|these|the (?:largest|larger|biggest))\b")


@dataclass(frozen=True)
class Fact:
    """One atom, stated at ``caption[start:end]``.

    kind: one of `KINDS`; subject: the finding, device or organ an attribute belongs to ("" when
    none does); value: a concept, a status (present, absent, possible), or a normalised measurement.
    """

    kind: str
    subject: str
    value: str
    start: int
    end: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two facts the same fact."""
        return self.kind, self.subject, self.value


@dataclass
class Statement:
    """A finding or device and what is said of it; attribute values map to their places."""

    kind: str
    concept: str
    status: str
    start: int
    end: int
    attributes: dict[str, dict[str, tuple[int, int]]] = field(
        default_factory=lambda: {name: {} for name in ATTRIBUTES}
    )

    def values(self, attribute: str) -> frozenset[str]:
        """The values of one attribute; both sides together are bilateral."""
        return frozenset(self.attributes[attribute])

    def facts(self) -> list[Fact]:
        """The statement's atoms: its presence first, then its attributes."""
        atoms = [Fact(self.kind, self.concept, self.status, self.start, self.end)]
        for name, places in self.attributes.items():
            atoms += [Fact(name, self.concept, v, *place) for v, place in places.items()]
        return atoms


@dataclass(frozen=True)
class Extraction:
    """All that one caption states."""

    statements: tuple[Statement, ...]
    loose: tuple[Fact, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Every atom, the global ones first."""
        return (*self.loose, *(f for s in self.statements for f in s.facts()))


def extract_facts(caption: str, lexicon: Path | None = None) -> Extraction:
    """The facts of `caption`; `lexicon` is a file, by default the shipped English one."""
    words = read_lexicon(lexicon)
    statements: list[Statement] = []
    loose: list[Fact] = []
    text, place = caption.lower(), 0
    for sentence in _SENTENCE.split(text):
        place = text.index(sentence, place)
        _read_sentence(sentence, place, words, lexicon, statements, loose)
        place += len(sentence)
    for statement in statements:
        _join_sides(statement)
    return Extraction(tuple(_merge(statements)), tuple(_unique(loose)))


def _read_sentence(
    sentence: str,
    offset: int,
    words: Lexicon,
    path: Path | None,
    statements: list[Statement],
    loose: list[Fact],
) -> None:
    terms = _terms(sentence, path)
    clauses = split_clauses(sentence, terms, path)
    mentions = [t for t in terms if t.kind in ("finding", "device")]
    anatomy = [t for t in terms if t.kind == "anatomy"]
    made: dict[int, Statement] = {}
    for m in mentions:
        near = {a.concept for a in anatomy if clauses.index(a.start) == clauses.index(m.start)}
        special = [c for organ, c in words.specialised.get(m.concept, {}).items() if organ in near]
        made[id(m)] = Statement(
            m.kind,
            special[0] if special else m.concept,
            status_of(sentence, clauses, m),
            offset + m.start,
            offset + m.end,
        )
    last = statements[-1] if statements else None
    for term in terms:
        span = (offset + term.start, offset + term.end)
        if term.kind in ("modality", "anatomy"):
            loose.append(Fact(term.kind, "", term.concept, *span))
        if term.kind not in ATTRIBUTES:
            continue
        owner = owner_of(sentence, clauses, term, mentions, terms, words.breaks)
        if owner is not None:
            made[id(owner)].attributes[term.kind].setdefault(term.concept, span)
        elif last is not None and _REFERS_BACK.match(sentence):
            last.attributes[term.kind].setdefault(term.concept, span)
        else:
            organ = anatomy_of(sentence, clauses, term, anatomy)
            if organ is not None or term.kind == "measurement":
                loose.append(Fact(term.kind, organ or "", term.concept, *span))
    for statement in made.values():
        _turn_opposite(statement, words)
        statements.append(statement)


def _terms(sentence: str, path: Path | None) -> list[Match]:
    """Terms and measurements of one sentence, in order; sides inside a finding's name included."""
    matcher = term_matcher(path)
    sizes = [Match("measurement", m.value, m.start, m.end) for m in find_measurements(sentence)]
    found = [m for m in matcher.find(sentence) if m.kind != "ignore"]
    terms = [t for t in found if all(t.end <= s.start or t.start >= s.end for s in sizes)]
    for term in [t for t in terms if t.kind == "finding"]:
        for inner in re.finditer(r"\b(?:left|right|\w+ly)\b", sentence[term.start : term.end]):
            nested = matcher.find(inner.group())
            terms += [
                Match(n.kind, n.concept, term.start + inner.start(), term.start + inner.end())
                for n in nested
                if n.kind in ATTRIBUTES
            ]
    return sorted(terms + sizes, key=lambda t: (t.start, -t.end))


def _turn_opposite(statement: Statement, words: Lexicon) -> None:
    """Say "normal" as "no abnormality": both are the status of one concept."""
    opposite = words.opposites.get(statement.concept)
    if opposite is not None:
        turned = {"present": "absent", "absent": "present"}
        statement.concept = opposite
        statement.status = turned.get(statement.status, statement.status)


def _join_sides(statement: Statement) -> None:
    sides = statement.attributes["laterality"]
    if "bilateral" in sides or {"left", "right"} <= set(sides):
        spans = list(sides.values())
        sides.clear()
        sides["bilateral"] = (min(s for s, _ in spans), max(e for _, e in spans))


def _merge(statements: Iterable[Statement]) -> list[Statement]:
    """Join mentions of the same thing; left and right mentions alike become one bilateral."""
    merged: list[Statement] = []
    for new in statements:
        for old in merged:
            if (old.concept, old.status) != (new.concept, new.status):
                continue
            if _compatible(old, new, ATTRIBUTES):
                for name in ATTRIBUTES:
                    for value, span in new.attributes[name].items():
                        old.attributes[name].setdefault(value, span)
                break
            both = old.values("laterality") | new.values("laterality")
            rest = ("severity", "measurement")
            if both == {"left", "right"} and all(old.values(n) == new.values(n) for n in rest):
                old.attributes["laterality"].update(new.attributes["laterality"])
                _join_sides(old)
                break
        else:
            merged.append(new)
    return merged


def _compatible(old: Statement, new: Statement, names: Sequence[str]) -> bool:
    pairs = [(old.values(n), new.values(n)) for n in names]
    return all(a == b or not a or not b for a, b in pairs)


def _unique(facts: Iterable[Fact]) -> list[Fact]:
    return list({f.key: f for f in reversed(list(facts))}.values())[::-1]
