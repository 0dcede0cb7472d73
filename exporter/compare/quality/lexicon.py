"""The words that the fact extractor knows: a data file with a schema, and its compiled patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec

from exporter.core.data import data_root
from exporter.core.errors import InputRefused

NOUNS = ("anatomy", "finding", "device")
TERMS = ("modality", *NOUNS, "laterality", "severity")
GAP = r"[\s\-]+"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict, immutable record."""


class Negation(Struct, frozen=True):
    """NegEx triggers: before and after what they negate, pseudo-triggers, ends of a scope."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    pseudo: tuple[str, ...]
    end: tuple[str, ...]


class Uncertain(Struct, frozen=True):
    """Triggers that make what they govern possible: what follows, precedes, or both."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    between: tuple[str, ...]


class Unit(Struct, frozen=True):
    """The canonical unit and the factor to it."""

    unit: str
    factor: float


class Lexicon(Struct, frozen=True):
    """One language's words; concepts map to the phrases that name them."""

    name: str
    language: str
    version: int
    modality: dict[str, tuple[str, ...]]
    anatomy: dict[str, tuple[str, ...]]
    finding: dict[str, tuple[str, ...]]
    device: dict[str, tuple[str, ...]]
    laterality: dict[str, tuple[str, ...]]
    severity: dict[str, tuple[str, ...]]
    opposites: dict[str, str]
    specialised: dict[str, dict[str, str]]
    composite: dict[str, dict[str, tuple[str, ...]]]
    lasting: frozenset[str]
    ignore: tuple[str, ...]
    negation: Negation
    uncertain: Uncertain
    past: tuple[str, ...]
    breaks: frozenset[str]
    numbers: dict[str, float]
    units: dict[str, Unit]

    def canonical(self, kind: str, word: str) -> str | None:
        """The concept of `kind` that `word` names exactly, or None."""
        for concept, phrases in getattr(self, kind).items():
            plural = kind in NOUNS
            if any(re.fullmatch(phrase_pattern(p, plural=plural), word.lower()) for p in phrases):
                return str(concept)
        return None


@dataclass(frozen=True)
class Match:
    """A phrase found at ``text[start:end]``."""

    kind: str
    concept: str
    start: int
    end: int


@dataclass(frozen=True)
class Pattern:
    """One concept's phrases; a text without any of `keys` contains none of them."""

    kind: str
    concept: str
    keys: tuple[str, ...]
    phrases: re.Pattern[str]


@dataclass(frozen=True)
class Matcher:
    """Finds the phrases of several concepts; where two overlap, the longer one stays."""

    patterns: tuple[Pattern, ...]

    def find(self, text: str) -> list[Match]:
        """All matches in lowercase `text`, in order, without overlaps."""
        found = [
            Match(p.kind, p.concept, m.start(), m.end())
            for p in self.patterns
            if any(key in text for key in p.keys)
            for m in p.phrases.finditer(text)
        ]
        # Ties go to the kind listed first; sorting is stable.
        found.sort(key=lambda m: m.start - m.end)
        taken: list[Match] = []
        for match in found:
            if all(match.end <= t.start or match.start >= t.end for t in taken):
                taken.append(match)
        return sorted(taken, key=lambda m: m.start)


def phrase_pattern(phrase: str, *, plural: bool) -> str:
    """The regular expression of one phrase of the lexicon's notation (without word boundaries)."""
    parts: list[tuple[str, bool]] = []
    for token in phrase.split():
        optional = token.endswith("~")
        words = [re.escape(w) for w in token.removesuffix("~").split("|")]
        parts.append((_any_of(words), optional))
    if plural:
        last = phrase.rsplit(maxsplit=1)[-1].removesuffix("~").split("|")
        parts[-1] = (_any_of([_with_plural(w) for w in last]), parts[-1][1])
    # The gap belongs to the optional word, so that its absence does not ask for two gaps.
    text = ""
    for index, (pattern, optional) in enumerate(parts):
        first = all(skipped for _, skipped in parts[:index])
        piece = pattern + GAP if first and optional else pattern if first else GAP + pattern
        text += f"(?:{piece})?" if optional else piece
    return text


def _any_of(words: list[str]) -> str:
    return f"(?:{'|'.join(words)})" if len(words) > 1 else words[0]


def _with_plural(word: str) -> str:
    if word.endswith("s"):
        return re.escape(word)
    if re.search(r"[^aeiou]y$", word):
        return f"{re.escape(word[:-1])}(?:y|ies)"
    return f"{re.escape(word)}(?:s|es)?"


def _keys(phrase: str) -> list[str]:
    """What a text must contain for the phrase to match: its first word that may not be missing."""
    needed = next((t for t in phrase.split() if not t.endswith("~")), phrase.rstrip("~"))
    # A plural changes a last y.
    return [word[:-1] if word.endswith("y") else word for word in needed.split("|")]


def build_matcher(groups: dict[tuple[str, str], tuple[str, ...]]) -> Matcher:
    """A matcher from phrases by (kind, concept)."""
    patterns = []
    for (kind, concept), phrases in groups.items():
        # Alternatives are tried in order: the longest phrase first makes the match the longest.
        ordered = sorted(phrases, key=lambda p: (-len(p.split()), -len(p)))
        body = "|".join(phrase_pattern(p, plural=kind in NOUNS) for p in ordered)
        keys = {key for phrase in phrases for key in _keys(phrase)}
        compiled = re.compile(rf"(?<![\w])(?:{body})(?![\w])")
        patterns.append(Pattern(kind, concept, tuple(sorted(keys)), compiled))
    return Matcher(tuple(patterns))


@cache
def read_lexicon(path: Path | None = None) -> Lexicon:
    """Read a lexicon file, by default the shipped English one. Raises `InputRefused`."""
    import yaml

    path = path or data_root("profiles") / "lexicon" / "clinical-en.yaml"
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Lexicon)
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputRefused(f"{path}: not YAML ({line}); correct the file") from error
    except msgspec.ValidationError as error:
        raise InputRefused(f"{path}: {error}; see docs/comparison.md for the keys") from error


@cache
def term_matcher(path: Path | None = None) -> Matcher:
    """Matcher of modality, anatomy, finding, device, laterality, severity and ignored phrases."""
    lexicon = read_lexicon(path)
    groups: dict[tuple[str, str], tuple[str, ...]] = {("ignore", ""): lexicon.ignore}
    groups |= {("composite", word): (word,) for word in lexicon.composite}
    for kind in ("finding", "device", "modality", "anatomy", "laterality", "severity"):
        groups |= {(kind, c): phrases for c, phrases in getattr(lexicon, kind).items()}
    return build_matcher(groups)


@cache
def trigger_matcher(path: Path | None = None) -> Matcher:
    """Matcher of negation and uncertainty triggers (before, after, pseudo, end, maybe_*, past_before)."""
    lexicon = read_lexicon(path)
    return build_matcher(
        {
            ("pseudo", ""): lexicon.negation.pseudo,
            ("maybe_before", ""): lexicon.uncertain.before,
            ("maybe_after", ""): lexicon.uncertain.after,
            ("maybe_between", ""): lexicon.uncertain.between,
            ("past_before", ""): lexicon.past,
            ("after", ""): lexicon.negation.after,
            ("before", ""): lexicon.negation.before,
            ("end", ""): lexicon.negation.end,
        }
    )
