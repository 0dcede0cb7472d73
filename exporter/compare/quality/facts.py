"""Clinical facts that an English caption states, by rules and a lexicon, with their places.

A *statement* is a finding or a device with its status, sides, severity and measurements; what
belongs to none (modality, anatomy, the side of an organ) is global. `facts` are the atoms of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from exporter.compare.quality.attach import Sentence, organ_of, owner_of
from exporter.compare.quality.lexicon import (
    GAP,
    Lexicon,
    Match,
    Matcher,
    read_lexicon,
    term_matcher,
)
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
    none does); value: a concept, a status (present, absent, possible, past), or a normalised
    measurement.
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
    parsed = Sentence(sentence, split_clauses(sentence, terms, path), terms, words.breaks)
    made = {m: _statement(parsed, m, offset, words) for m in parsed.mentions}
    last = statements[-1] if statements else None
    for term in terms:
        span = (offset + term.start, offset + term.end)
        if term.kind in ("modality", "anatomy"):
            loose.append(Fact(term.kind, "", term.concept, *span))
        if term.kind not in ATTRIBUTES or _names_panel(parsed, term):
            continue
        owner = owner_of(parsed, term)
        if owner is None and last is not None and _REFERS_BACK.match(sentence):
            last.attributes[term.kind].setdefault(term.concept, span)
            continue
        owner = owner or organ_of(parsed, term)
        if owner in made:
            # "Small-bore catheter": the size of a device is no grade.
            if (made[owner].kind, term.kind) != ("device", "severity"):
                made[owner].attributes[term.kind].setdefault(term.concept, span)
        elif owner is not None or term.kind == "measurement":
            loose.append(Fact(term.kind, owner.concept if owner else "", term.concept, *span))
    for statement in made.values():
        _turn_opposite(statement, words)
        statements.append(statement)


def _names_panel(sentence: Sentence, term: Match) -> bool:
    """As in "axial CT (left) and PET (right)" and "left: T1-weighted image": a place on the page."""
    if term.kind != "laterality":
        return False
    around = sentence.text[max(term.start - 1, 0) : term.end + 1]
    before = [t for t in sentence.terms if t.end <= term.start]
    after = [t for t in sentence.terms if t.start >= term.end]
    if around.startswith("(") and around.endswith(")"):
        return bool(before) and before[-1].kind == "modality"
    return (
        term.start == 0 and around.endswith(":") and after[:1] != [] and after[0].kind == "modality"
    )


def _statement(sentence: Sentence, mention: Match, offset: int, words: Lexicon) -> Statement:
    concept = _special_concept(sentence, mention, words)
    status = status_of(sentence.text, sentence.clauses, mention)
    if status == "past" and concept in words.lasting:
        status = "present"
    return Statement(mention.kind, concept, status, offset + mention.start, offset + mention.end)


def _special_concept(sentence: Sentence, mention: Match, words: Lexicon) -> str:
    """A stone is a kidney stone where its clause (or, if it names no organ, its sentence) says kidney."""
    special = words.specialised.get(mention.concept)
    if special is None:
        return mention.concept
    start, end = sentence.clause(mention.start)
    organs = [t for t in sentence.terms if t.kind == "anatomy"]
    near = [a for a in organs if start <= a.start < end] or organs
    fitting = [a for a in near if a.concept in special]
    if not fitting:
        return mention.concept
    nearest = min(fitting, key=lambda a: max(a.start - mention.end, mention.start - a.end))
    return special[nearest.concept]


@lru_cache(maxsize=2048)  # reports repeat their sentences
def _terms(sentence: str, path: Path | None) -> tuple[Match, ...]:
    """Terms and measurements of one sentence, in order; what a finding's name contains included."""
    words, matcher = read_lexicon(path), term_matcher(path)
    sizes = [Match("measurement", m.value, m.start, m.end) for m in find_measurements(sentence)]
    found = [m for m in matcher.find(sentence) if m.kind != "ignore"]
    terms: list[Match] = []
    for term in found:
        if any(term.start < s.end and s.start < term.end for s in sizes):
            continue
        if term.kind == "composite":
            parts = words.composite[re.sub(GAP, " ", sentence[term.start : term.end])]
            terms += [Match(k, c, term.start, term.end) for k in parts for c in parts[k]]
            continue
        terms.append(term)
        if term.kind == "finding":
            terms += _nested(sentence, term, words, matcher)
    return tuple(sorted(terms + sizes, key=lambda t: (t.start, -t.end)))


def _nested(sentence: str, term: Match, words: Lexicon, matcher: Matcher) -> list[Match]:
    """As in "heart is mildly enlarged" (a grade) and "bony abnormality" (an organ)."""
    general = term.concept in words.opposites or term.concept in words.opposites.values()
    inner = []
    for word in re.finditer(r"\w+", sentence[term.start : term.end]):
        if word.end() - word.start() == term.end - term.start:
            continue
        for n in matcher.find(word.group()):
            grade = n.kind == "severity" and word.group().endswith("ly")
            if grade or n.kind in ("laterality", "modality") or (general and n.kind == "anatomy"):
                start = term.start + word.start()
                inner.append(Match(n.kind, n.concept, start + n.start, start + n.end))
    return inner


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
