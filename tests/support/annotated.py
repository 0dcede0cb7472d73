"""Captions with hand-annotated facts, and the figures that are computed on them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from exporter.compare.quality.facts import Fact
from exporter.core.data import data_root

CAPTIONS = Path(__file__).parents[1] / "data" / "clinical_captions.jsonl"
PHANTOM_SETS = ("phantoms-calib", "phantoms-eval")
_WORD_OF_STATUS = {False: "present", True: "absent"}


@dataclass(frozen=True)
class Annotated:
    """A caption and the facts that a reader finds in it, with their places.

    style: figure, report or phantom; split: development, held-out, unseen (`README.md`), or drawn.
    """

    name: str
    style: str
    split: str
    text: str
    facts: tuple[Fact, ...]


@cache
def annotated_captions() -> tuple[Annotated, ...]:
    """The hand-annotated set of the repository."""
    rows = [json.loads(line) for line in CAPTIONS.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Annotated(r["id"], r["style"], r["split"], r["text"], tuple(Fact(*f) for f in r["facts"]))
        for r in rows
    )


def hashed_split(text: str) -> str:
    """A third of the captions, chosen by their hash, is held out."""
    third = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 3 == 0
    return "held-out" if third else "development"


@cache
def phantom_captions() -> tuple[Annotated, ...]:
    """The different captions of the shipped phantom sets; the facts are those that were drawn."""
    found: dict[str, Annotated] = {}
    for name in PHANTOM_SETS:
        lines = (data_root("calibration") / name / "samples.jsonl").read_text(encoding="utf-8")
        for sample in map(json.loads, lines.splitlines()):
            text = sample["caption"]
            if text not in found:
                facts = tuple(_placed(text, f) for f in sample["facts"])
                found[text] = Annotated(sample["id"], "phantom", "drawn", text, facts)
    return tuple(found.values())


def _placed(caption: str, fact: dict[str, object]) -> Fact:
    """A drawn fact where the caption says it: attributes in the sentence of what they belong to."""
    kind, value, of = str(fact["type"]), str(fact["value"]), str(fact["of"] or "")
    text, start = caption.lower(), 0
    if kind in ("laterality", "severity", "measurement"):
        start = text.rfind(". ", 0, text.index(of.lower())) + 1
    place = re.compile(rf"\b{re.escape(value.lower())}\b").search(text, start)
    assert place is not None, (caption, fact)
    span = (place.start(), place.end())
    if kind in ("finding", "device"):
        return Fact(kind, value, _WORD_OF_STATUS[bool(fact["negated"])], *span)
    return Fact(kind, of, value, *span)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 per cent interval of a rate (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, rate = 1.959964, hits / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A plain text table."""
    cells = [list(header), *(list(r) for r in rows)]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    return "\n".join(["", title, *lines])
