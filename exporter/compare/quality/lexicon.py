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
    """Triggers that make what they govern possible instead of present."""

    before: tuple[str, ...]
    after: tuple[str, ...]


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
    ignore: tuple[str, ...]
    negation: Negation
    uncertain: Uncertain
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
class Matcher:
    """Finds the phrases of several concepts; where two overlap, the longer one stays."""

    patterns: tuple[tuple[str, str, re.Pattern[str]], ...]

    def find(self, text: str) -> list[Match]:
        """All matches in lowercase `text`, in order, without overlaps."""
        found = [
            Match(kind, concept, m.start(), m.end())
            for kind, concept, pattern in self.patterns
            for m in pattern.finditer(text)
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
        parts.append((f"(?:{'|'.join(words)})" if len(words) > 1 else words[0], optional))
    if plural and not parts[-1][0].endswith("s"):
        parts[-1] = (f"{parts[-1][0]}(?:s|es)?", parts[-1][1])
    # The gap belongs to the optional word, so that its absence does not ask for two gaps.
    text = ""
    for index, (pattern, optional) in enumerate(parts):
        piece = pattern if index == 0 else GAP + pattern
        text += f"(?:{piece})?" if optional else piece
    return text


def build_matcher(groups: dict[tuple[str, str], tuple[str, ...]]) -> Matcher:
    """A matcher from phrases by (kind, concept)."""
    patterns = []
    for (kind, concept), phrases in groups.items():
        # Alternatives are tried in order: the longest phrase first makes the match the longest.
        ordered = sorted(phrases, key=lambda p: (-len(p.split()), -len(p)))
        body = "|".join(phrase_pattern(p, plural=kind in NOUNS) for p in ordered)
        patterns.append((kind, concept, re.compile(rf"(?<![\w])(?:{body})(?![\w])")))
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
    for kind in ("finding", "device", "modality", "anatomy", "laterality", "severity"):
        groups |= {(kind, c): phrases for c, phrases in getattr(lexicon, kind).items()}
    return build_matcher(groups)


@cache
def trigger_matcher(path: Path | None = None) -> Matcher:
    """Matcher of negation and uncertainty triggers (kinds before, after, pseudo, end, maybe_*)."""
    lexicon = read_lexicon(path)
    return build_matcher(
        {
            ("pseudo", ""): lexicon.negation.pseudo,
            ("maybe_before", ""): lexicon.uncertain.before,
            ("maybe_after", ""): lexicon.uncertain.after,
            ("after", ""): lexicon.negation.after,
            ("before", ""): lexicon.negation.before,
            ("end", ""): lexicon.negation.end,
        }
    )
