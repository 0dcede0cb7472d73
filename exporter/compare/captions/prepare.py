"""Text preparation that metrics share."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace

from exporter.compare.captions.base import Pair

_DIGITS = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n\s*\n")
# A period after one of these, or after a single letter, ends no sentence.
_SHORT = frozenset(
    {"al", "approx", "ca", "cf", "dr", "e.g", "etc", "fig", "figs", "i.e", "mr", "mrs", "ms", "no",
     "nos", "prof", "resp", "st", "vs"}
)  # fmt: skip


def imageclef_text(text: str) -> str:
    """Lowercase, each run of digits to "number", ASCII punctuation removed, in that order.

    "3.5 cm" becomes "numbernumber cm": the caption task's BERTScore, ROUGE and BLEURT see no number.
    """
    return _DIGITS.sub("number", text.lower()).translate(_PUNCTUATION)


def imageclef_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with both texts prepared by `imageclef_text`."""
    return [replace(p, truth=imageclef_text(p.truth), said=imageclef_text(p.said)) for p in pairs]


def sentences(text: str) -> list[str]:
    """Sentences of an English text, without surrounding space; none for a blank text.

    A sentence ends at . ! ? before a space and a capital or a digit, not after an abbreviation or an
    initial; an empty line ends one too. NLTK's punkt, which AlignScore uses, needs a downloaded model;
    on captions and reports the two differ only at abbreviations.
    """
    found, start = [], 0
    for match in _END.finditer(text):
        before = text[start : match.start()].split()
        last = before[-1].rstrip("\"')]") if before else ""
        word = last.rstrip(".").lstrip("\"'([").lower()
        if last.endswith(".") and (word in _SHORT or (len(word) == 1 and word.isalpha())):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    found.append(text[start:])
    return [s.strip() for s in found if s.strip()]
