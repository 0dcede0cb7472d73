"""Numbers with units in text, normalised: 1.9 cm and 19-mm are the same measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from exporter.compare.quality.lexicon import read_lexicon


@dataclass(frozen=True)
class Measurement:
    """A measurement at ``text[start:end]``; `value` is normalised text such as "19 mm"."""

    value: str
    start: int
    end: int


@cache
def _pattern(path: Path | None) -> re.Pattern[str]:
    lexicon = read_lexicon(path)
    words = "|".join(sorted(lexicon.numbers, key=len, reverse=True))
    number = rf"(?:\d+(?:[.,]\d+)*|(?:{words})(?=[\s\-]))"
    names = sorted(lexicon.units, key=len, reverse=True)
    unit = "(?:" + "|".join(r"\s?".join(map(re.escape, name.split())) for name in names) + ")"
    # A lone "by" or "to" needs its spaces; "x", a cross and dashes do not.
    join = r"(?:\s*[x×*–\-]\s*|\s+(?:by|to)\s+)"
    tail = rf"(?:{join}{number}(?:[\s\-]*{unit}(?![\w]))?)*"
    return re.compile(
        rf"(?<![\w.,])(?P<numbers>{number}(?:[\s\-]*{unit}(?=\s*[x×*]|\s+by\s))?{tail}?)"
        rf"[\s\-]*(?P<unit>{unit})(?![\w])"
    )


def find_measurements(text: str, path: Path | None = None) -> list[Measurement]:
    """Measurements in lowercase `text`, in order.

    Sides ("3 x 4 cm") are sorted, the longest first: their order is not a fact. Ranges ("3-4 cm",
    "3 to 4 cm") keep theirs. Lengths are in mm, rounded to 0.1; areas in mm2; ml, hu, mmhg as is.
    """
    lexicon = read_lexicon(path)
    found = []
    for match in _pattern(path).finditer(text):
        unit = lexicon.units[" ".join(match["unit"].split())]
        body = match["numbers"]
        words = "|".join(sorted(lexicon.numbers, key=len, reverse=True))
        raw = re.findall(rf"\d+(?:[.,]\d+)*|\b(?:{words})\b", body)
        values = [round(_number(r, lexicon.numbers) * unit.factor, 1) for r in raw]
        if not values:
            continue
        sides = re.search(r"[x×*]|\bby\b", body) is not None
        ordered = sorted(values, reverse=True) if sides else values
        text_value = (" x " if sides else "-").join(f"{v:g}" for v in ordered)
        found.append(Measurement(f"{text_value} {unit.unit}", match.start(), match.end()))
    return found


def _number(text: str, words: dict[str, float]) -> float:
    if text in words:
        return words[text]
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", text):
        return float(text.replace(",", ""))
    head, *rest = re.split(r"[.,]", text)
    return float(f"{head}.{rest[0]}" if rest else head)
