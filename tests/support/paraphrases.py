"""Rewrites of an annotated caption that keep its meaning, one kind at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

from exporter.compare.quality.facts import Fact
from tests.support.annotated import Annotated


def _sub(*pairs: tuple[str, str]) -> Callable[[Annotated], str]:
    """Replace whole words, keeping a capital at the start."""

    def rewrite(caption: Annotated) -> str:
        text = caption.text
        for pattern, put in pairs:

            def swap(m: re.Match[str], put: str = put) -> str:
                new = m.expand(put)
                return new[:1].upper() + new[1:] if m.group()[:1].isupper() else new

            text = re.sub(pattern, swap, text, flags=re.IGNORECASE)
        return text

    return rewrite


def to_cm(caption: Annotated) -> str:
    """Lengths in mm said in cm."""
    return _lengths(caption.text, "mm", "cm", 0.1)


def to_mm(caption: Annotated) -> str:
    """Lengths in cm said in mm."""
    return _lengths(caption.text, "cm", "mm", 10)


def _lengths(text: str, old: str, new: str, factor: float) -> str:
    def said(match: re.Match[str]) -> str:
        numbers = re.sub(r"\d+(?:\.\d+)?", lambda n: f"{float(n[0]) * factor:.4g}", match[1])
        return numbers + new

    return re.sub(rf"(\d[\d. x×–\-]*){old}\b", said, text)


def side_behind(caption: Annotated) -> str:
    """ "left effusion" as "effusion on the left"."""
    for side in caption.facts:
        nouns = [f for f in caption.facts if f.subject == side.subject and f.start == side.end + 1]
        word = caption.text[side.start : side.end]
        if side.kind == "laterality" and word.lower() == side.value != "bilateral" and _own(nouns):
            noun = nouns[0]
            tail = caption.text[noun.start : noun.end] + f" on the {side.value}"
            if word[0].isupper():
                tail = tail[0].upper() + tail[1:]
            return caption.text[: side.start] + tail + caption.text[noun.end :]
    return caption.text


def size_behind(caption: Annotated) -> str:
    """ "8 mm nodule" as "nodule measuring 8 mm"."""
    for size in caption.facts:
        nouns = [f for f in caption.facts if f.subject == size.subject and f.start == size.end + 1]
        if size.kind == "measurement" and _own(nouns):
            noun = nouns[0]
            tail = f"{caption.text[noun.start : noun.end]} measuring {caption.text[size.start : size.end]}"
            head = re.sub(r"\b[Aa]n? $", "a ", caption.text[: size.start])
            if caption.text[size.start : size.end].startswith("a "):
                return caption.text
            return head + tail + caption.text[noun.end :]
    return caption.text


def _own(nouns: list[Fact]) -> bool:
    return bool(nouns) and nouns[0].kind in ("finding", "device")


def list_turned(caption: Annotated) -> str:
    """ "no A or B" as "no B or A"; both are annotated as absent."""
    absent = [f for f in caption.facts if f.kind == "finding" and f.value == "absent"]
    for one in absent:
        for two in absent:
            if re.fullmatch(r",? (?:or|nor) ", caption.text[one.end : two.start]):
                a, b = caption.text[one.start : one.end], caption.text[two.start : two.end]
                between = caption.text[one.end : two.start]
                return caption.text[: one.start] + b + between + a + caption.text[two.end :]
    return caption.text


def sentences_turned(caption: Annotated) -> str:
    """The last sentence before the one in front of it, where neither leans on another."""
    parts = re.split(r"(?<=\.) (?=[A-Z])", caption.text)
    leaning = re.compile(r"^(?:It|They|This|These|The largest|No residual|No new|Otherwise)\b")
    if len(parts) < 3 or any(leaning.match(p) for p in parts):
        return caption.text
    return " ".join([*parts[:-2], parts[-1], parts[-2]])


def not_seen(caption: Annotated) -> str:
    """ "No X." as "X is not seen." where X is the whole sentence."""
    for fact in caption.facts:
        words = caption.text[fact.start : fact.end]
        whole = f"No {words}."
        at = fact.start - 3
        if fact.value == "absent" and at >= 0 and caption.text[at : at + len(whole)] == whole:
            verb = "are" if words.endswith("s") and not words.endswith(("is", "us", "x")) else "is"
            said = f"{words[0].upper()}{words[1:]} {verb} not seen."
            return caption.text[:at] + said + caption.text[at + len(whole) :]
    return caption.text


REWRITES: dict[str, Callable[[Annotated], str]] = {
    "mm as cm": to_cm,
    "cm as mm": to_mm,
    "left-sided as left": _sub((r"\b(left|right)-sided\b", r"\1")),
    "left X as X on the left": side_behind,
    "8 mm X as X measuring 8 mm": size_behind,
    "measuring as of": _sub((r"\bmeasuring\b", "of")),
    "no as no evidence of": _sub((r"\bno (?!evidence|change|doubt|longer|significant|new)", "no evidence of ")),
    "no evidence of as no": _sub((r"\bno evidence of\b", "no")),
    "without as with no": _sub((r"\bwithout (?!significant|any|evidence|contrast)", "with no ")),
    "no X as X is not seen": not_seen,
    "order of a list": list_turned,
    "order of sentences": sentences_turned,
    "X-ray as radiograph": _sub((r"\bx-ray\b", "radiograph")),
    "radiograph as X-ray": _sub((r"\bradiograph\b", "X-ray")),
    "CT and MRI in full": _sub((r"\bCT\b", "computed tomography"), (r"\bMRI\b", "magnetic resonance imaging")),
    "showing as demonstrating": _sub((r"\bshowing\b", "demonstrating"), (r"\bshows\b", "demonstrates")),
    "demonstrates as reveals": _sub((r"\bdemonstrates\b", "reveals"), (r"\bdemonstrating\b", "revealing")),
    "chest CT as CT of the chest": _sub((r"\bchest (CT|X-ray|radiograph)\b", r"\1 of the chest")),
    "CT of the chest as chest CT": _sub((r"\b(CT|X-ray|radiograph) of the chest\b", r"chest \1")),
    "CT of the abdomen as abdominal CT": _sub((r"\bCT of the abdomen\b", "abdominal CT")),
    "mild as slight": _sub((r"\bmild\b", "slight"), (r"\bmildly\b", "slightly")),
    "severe as marked": _sub((r"\bsevere\b", "marked"), (r"\bseverely\b", "markedly")),
    "large as big": _sub((r"\blarge\b(?! body)", "big")),
    "bilateral effusions as effusion": _sub((r"\bbilateral pleural effusions\b", "bilateral pleural effusion")),
    "there is as is noted": _sub((r"(?:(?<=\. )|^)There is (an? [^.,;]*?)\.(?=\s|$)", r"\1 is noted.")),
    "arteries and lobes in short": _sub((r"\bright upper lobe\b", "RUL"), (r"\bleft lower lobe\b", "LLL")),
    "devices in short": _sub((r"\bendotracheal tube\b", "ETT"), (r"\bnasogastric tube\b", "NG tube"),
                             (r"\bcentral venous catheter\b", "central line")),
    "British spelling": _sub((r"\bedema\b", "oedema"), (r"hemorrhage\b", "haemorrhage"),
                             (r"hematoma\b", "haematoma"), (r"\besophagus\b", "oesophagus"),
                             (r"\bgoiter\b", "goitre")),
    "hyphens": _sub((r"(\d) (mm|cm)(?= \w)", r"\1-\2"), (r"(T[12])-weighted", r"\1 weighted")),
    "capitals": lambda c: c.text.upper(),
    "small letters": lambda c: c.text.lower(),
    "full stop left out": lambda c: c.text.rstrip("."),
    "a line per sentence": lambda c: re.sub(r"(?<=\.) (?=[A-Z])", "\n", c.text),
    "semicolons": lambda c: re.sub(r"\. (?=[A-Z][a-z])", "; ", c.text),
}  # fmt: skip


def paraphrases(caption: Annotated) -> dict[str, str]:
    """What each rewrite makes of the caption, where it changes anything."""
    made = {name: rewrite(caption) for name, rewrite in REWRITES.items()}
    return {name: text for name, text in made.items() if text != caption.text}
