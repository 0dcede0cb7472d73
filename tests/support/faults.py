"""Faults put into annotated captions: each changes one stated fact, and only its words.

They are made at annotated places, so that a fault is a fault for a reader; nothing here knows the
extractor's words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from exporter.compare.quality.facts import Fact
from tests.support.annotated import Annotated


@dataclass(frozen=True)
class Injected:
    """A caption before and after one fault; `kinds` are the kinds of fact it may turn over."""

    fault: str
    kinds: tuple[str, ...]
    before: str
    after: str


_SIDES = {
    "left": "right",
    "right": "left",
    "bilateral": "left",
    "bilaterally": "on the left",
    "levo": "dextro",
    "dextro": "levo",
}
_SIDES |= {"lul": "rul", "lll": "rll", "rul": "lul", "rll": "lll"}
_GRADES = {
    "mild": "severe", "mildly": "severely", "slight": "severe", "small": "large", "tiny": "large",
    "trace": "large", "minimal": "extensive", "moderate": "mild", "severe": "mild",
    "large": "small", "marked": "mild", "massive": "tiny", "extensive": "minimal",
}  # fmt: skip
_DEVICES = ("pacemaker", "chest tube", "nasogastric tube", "central venous catheter",
            "endotracheal tube", "ureteral stent", "ventricular shunt", "biopsy needle")  # fmt: skip
# A cue and what stands in its place when the denial is dropped.
_DROPPED = (
    (r"there is no evidence of ", "there is "), (r"there (is|are) no ", r"there \1 "),
    (r"no (?:radiographic )?evidence of ", ""), (r"without evidence of ", "with "),
    (r"without (?!contrast)", "with "), (r"negative for ", "positive for "), (r"(?:are|is) free of ", "show "),
    (r"neither (.*?) nor ", r"\1 and "), (r"no longer ", ""), (r"(is|are) not ", r"\1 "),
    (r"has resolved", "has persisted"), (r"have resolved", "have persisted"),
    (r"is absent", "is present"), (r"absent", "present"), (r"(has|have) been removed", r"\1 been placed"),
    (r"removal of ", "placement of "), (r"no ", ""), (r"unremarkable", "abnormal"),
    (r"within normal limits", "abnormal"), (r"normal", "abnormal"), (r"clear", "abnormal"),
)  # fmt: skip
_BEFORE_PHRASE = re.compile(
    r"(?:^|(?<=[.;:] )|\b(?:an?|shows|showing|showed|demonstrates|demonstrating|reveals|revealing|"
    r"with|there is|there are|(?P<be>is|are)) )$"
)
_STOP = re.compile(
    r"\b(?:an?|the|of|in|on|at|with|and|or|but|to|from|by|for|shows?|showing|showed|is|are|was|"
    r"demonstrat\w+|reveal\w*|after|which|contains|measures|no|not|without|as|versus)$"
)


def swap_side(caption: Annotated, _: random.Random) -> Iterator[str]:
    """left for right, right for left, left for bilateral."""
    for fact in _of_kind(caption, "laterality"):
        words = _words(caption, fact)
        # "bilateral masses, the right of 4 cm": one word changed would leave the other.
        said_again = re.search(r"\b(?:left|right)\b", caption.text.lower())
        if fact.value == "bilateral" and ("bilateral" not in words.lower() or said_again):
            continue
        yield _put(caption, fact, _replaced(words, _SIDES))


def drop_negation(caption: Annotated, _: random.Random) -> Iterator[str]:
    """A denial, or "normal", taken back; the second "no" of "no A and no B" stays.

    "No A and B" still denies B for many readers.
    """
    absent = [f for f in caption.facts if f.kind in ("finding", "device") and f.value == "absent"]
    text, taken = caption.text, set[int]()
    for pattern, put in _DROPPED:
        for cue in re.finditer(rf"\b{pattern}", text, re.IGNORECASE):
            if any(i in taken for i in range(*cue.span())) or not _denies(cue, absent, text):
                continue
            if re.search(
                r"\b(?:no|without)\b[^.;]*(?:,|and|or) $", text[: cue.start()], re.IGNORECASE
            ):
                continue
            taken.update(range(*cue.span()))
            new = cue.expand(put)
            tail = text[cue.end() :]
            if text[cue.start()].isupper():
                new = new[:1].upper() + new[1:]
                tail = tail if new else tail[:1].upper() + tail[1:]
            yield text[: cue.start()] + new + tail


def add_negation(caption: Annotated, _: random.Random) -> Iterator[str]:
    """ "No" put before what is present, or "not" before what something is."""
    for fact in caption.facts:
        if fact.kind not in ("finding", "device") or fact.value != "present":
            continue
        words = _words(caption, fact)
        verb = re.search(r"\b(?:is|are) (?!not)", words)
        if verb:
            yield _put(caption, fact, words[: verb.end()] + "not " + words[verb.end() :])
            continue
        start = _phrase_start(caption.text, fact.start)
        head, tail = caption.text[:start], caption.text[start:]
        context = _BEFORE_PHRASE.search(head)
        if context is None:
            continue
        if context["be"] and not re.search(r"there (?:is|are) $", head, re.IGNORECASE):
            yield head + "not " + tail
        elif re.search(r"\ban? $", head, re.IGNORECASE):
            article = re.search(r"\ban? $", head, re.IGNORECASE)
            assert article
            yield head[: article.start()] + ("No " if article.group()[0] == "A" else "no ") + tail
        elif head == "" or head.endswith((". ", ": ", "; ")):
            acronym = tail[:2].isupper()
            yield head + "No " + (tail if acronym else tail[:1].lower() + tail[1:])
        else:
            yield head + "no " + tail


def change_number(caption: Annotated, chance: random.Random) -> Iterator[str]:
    """One number of a measurement another one."""
    for fact in _of_kind(caption, "measurement"):
        words = _words(caption, fact)
        number = chance.choice(list(re.finditer(r"\d+(?:\.\d+)?", words)))
        old = float(number.group())
        new = chance.choice((old * 2, old * 3, old + 7, old * 10, old / 2 if old > 3 else old * 4))
        yield _put(caption, fact, words[: number.start()] + f"{new:g}" + words[number.end() :])


def change_unit(caption: Annotated, _: random.Random) -> Iterator[str]:
    """mm for cm and cm for mm; ml for mm where the unit is ml."""
    for fact in _of_kind(caption, "measurement"):
        words = _words(caption, fact)
        swapped = re.sub(
            r"mm(?!H)|cm|ml", lambda m: {"mm": "cm", "cm": "mm", "ml": "mm"}[m[0]], words
        )
        if swapped != words:
            yield _put(caption, fact, swapped)


def swap_device(caption: Annotated, chance: random.Random) -> Iterator[str]:
    """Another device in the place of one that is there."""
    for fact in caption.facts:
        if fact.kind == "device" and fact.value == "present":
            stated = {f.subject for f in caption.facts if f.kind == "device"}
            name = chance.choice([d for d in _DEVICES if d not in stated])
            words = _words(caption, fact)
            yield _put(caption, fact, _like(words, name + "s" if words.endswith("s") else name))


def change_severity(caption: Annotated, _: random.Random) -> Iterator[str]:
    """Another grade."""
    for fact in _of_kind(caption, "severity"):
        yield _put(caption, fact, _replaced(_words(caption, fact), _GRADES))


def delete_sentence(caption: Annotated, _: random.Random) -> Iterator[str]:
    """One sentence left out that says what no other sentence says."""
    spans = [m.span() for m in re.finditer(r"\S.*?(?:\.(?=\s|$)|$)", caption.text)]
    for start, end in spans if len(spans) > 1 else ():
        inside = {f.key for f in caption.facts if start <= f.start < end}
        outside = {f.key for f in caption.facts if not start <= f.start < end}
        if inside - outside:
            yield (caption.text[:start] + caption.text[end:].lstrip()).strip()


FAULTS: dict[str, tuple[Callable[[Annotated, random.Random], Iterator[str]], tuple[str, ...]]] = {
    "side swapped": (swap_side, ("laterality",)),
    "negation dropped": (drop_negation, ("finding", "device")),
    "negation added": (add_negation, ("finding", "device")),
    "number changed": (change_number, ("measurement",)),
    "unit changed": (change_unit, ("measurement",)),
    "device swapped": (swap_device, ("device",)),
    "severity changed": (change_severity, ("severity",)),
    "sentence deleted": (delete_sentence, ()),
}


def inject(caption: Annotated, seed: str) -> list[Injected]:
    """Every fault that fits the caption, one at a time; the same for the same seed."""
    found = []
    for name, (make, kinds) in FAULTS.items():
        for after in dict.fromkeys(make(caption, random.Random(f"{seed} {name} {caption.name}"))):
            assert after != caption.text, (name, after)
            found.append(Injected(name, kinds, caption.text, after))
    return found


def _of_kind(caption: Annotated, kind: str) -> list[Fact]:
    return [f for f in caption.facts if f.kind == kind]


def _words(caption: Annotated, fact: Fact) -> str:
    return caption.text[fact.start : fact.end]


def _put(caption: Annotated, fact: Fact, words: str) -> str:
    return caption.text[: fact.start] + words + caption.text[fact.end :]


def _like(words: str, new: str) -> str:
    return new[:1].upper() + new[1:] if words[:1].isupper() else new


def _replaced(words: str, table: dict[str, str]) -> str:
    """The first word of the table replaced, with the same capitals."""
    for old in sorted(table, key=len, reverse=True):
        place = re.search(rf"\b{old}(?=\b|scoliosis)", words, re.IGNORECASE)
        if place:
            new = (
                table[old].upper() if place.group().isupper() else _like(place.group(), table[old])
            )
            return words[: place.start()] + new + words[place.end() :]
    return words


def _denies(cue: re.Match[str], absent: list[Fact], text: str) -> bool:
    """Whether a fact that is annotated as absent stands in the cue's sentence where it reaches."""
    begin = max(text.rfind(". ", 0, cue.start()), text.rfind("; ", 0, cue.start())) + 1
    stop = re.compile(
        r"[.;](?=\s|$)|\b(?:but|no|without|not)\b|, however|\bother than\b", re.IGNORECASE
    ).search(text, cue.end())
    end = stop.start() if stop else len(text)
    backward = re.match(r"has|have|is|are|absent|no longer", cue.group(), re.IGNORECASE)
    if re.match(r"normal|clear|unremarkable|within", cue.group(), re.IGNORECASE):
        return any(f.start < cue.end() and cue.start() < f.end for f in absent)
    if backward and not re.search(r"free of", cue.group()):
        return any(begin <= f.start < end for f in absent)
    return any(cue.start() <= f.start < end for f in absent)


def _phrase_start(text: str, position: int) -> int:
    """Where the noun phrase begins whose noun stands at `position`: adjectives and sizes only."""
    while True:
        before = re.search(r"(?:[\w.\-/]|\d [x×] (?=\d))+ $", text[:position])
        if before is None or before.group().endswith((". ", ": ")):
            return position
        if _STOP.search(before.group().strip().lower()):
            return position
        position = before.start()
