"""UMLS concept F1: concepts of the caption against those of the ground truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from exporter.compare.captions.base import Pair, Tally, mean_tally
from exporter.compare.quality.rouge import words
from exporter.core.errors import InputRefused, require

HEADER = ("cui", "types", "term")
MAX_LINE = 4096
_CUI = re.compile(r"C\d{7}", re.ASCII)
_TYPE = re.compile(r"T\d{3}", re.ASCII)

# Semantic types of the groups that MEDCON counts (Yim et al. 2023; groups of the UMLS Semantic Network).
MEDCON: dict[str, str] = {
    "anatomy": "T017 T018 T021 T022 T023 T024 T025 T026 T029 T030 T031",
    "chemicals and drugs": (
        "T103 T104 T109 T110 T111 T114 T115 T116 T118 T119 T120 T121 T122 T123 T124 T125 T126 T127 "
        "T129 T130 T131 T192 T195 T196 T197 T200"
    ),
    "devices": "T074 T075 T203",
    "disorders": "T019 T020 T033 T037 T046 T047 T048 T049 T050 T184 T190 T191",
    "genes": "T028 T085 T086 T087 T088",
    "phenomena": "T034 T038 T067 T068 T069 T070",
    "physiology": "T032 T039 T040 T041 T042 T043 T044 T045 T201",
}
MEDCON_TYPES = frozenset(t for types in MEDCON.values() for t in types.split())

Found = Mapping[str, frozenset[str]]


class Linker(Protocol):
    """Finds concepts in a text."""

    def concepts(self, text: str) -> Found:
        """Concept identifiers with their semantic types."""


class Concepts:
    """`CaptionMetric`: mean F1 of concept sets, in 0..1.

    concepts_medcon counts concepts of the seven MEDCON groups and takes two texts without any as
    agreeing (1); concepts_all counts all types and takes them as 0, as the 2026 evaluator does. Two blank
    captions are 1 in both.
    """

    def __init__(self, path: Path) -> None:
        """Open a concept dictionary (.tsv) or a MedCAT model pack (folder or .zip)."""
        self._linker: Linker
        if path.suffix == ".tsv":
            self._linker = Dictionary(path)
            self.how = f"dictionary of {len(self._linker.terms)} terms, longest match of words"
        else:
            self._linker = MedCat(path)
            self.how = "MedCAT model pack"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures concepts_medcon and concepts_all."""
        found = {t: self._linker.concepts(t) for p in pairs for t in (p.truth, p.said)}
        medcon, whole = [], []
        for pair in pairs:
            truth, said = found[pair.truth], found[pair.said]
            blank = not pair.truth.strip() and not pair.said.strip()
            medcon.append(set_f1(_medcon(truth), _medcon(said), empty=1.0))
            whole.append(set_f1(set(truth), set(said), empty=1.0 if blank else 0.0))
        return {"concepts_medcon": mean_tally(medcon), "concepts_all": mean_tally(whole)}


def _medcon(found: Found) -> set[str]:
    return {cui for cui, types in found.items() if types & MEDCON_TYPES}


def set_f1(truth: set[str], said: set[str], *, empty: float) -> float:
    """F1 of two sets; `empty` where both are."""
    if not truth and not said:
        return empty
    return 2 * len(truth & said) / (len(truth) + len(said))


class Dictionary:
    """Concepts by literal terms.

    A tab-separated UTF-8 file with the header "cui types term"; types are UMLS semantic types joined by
    ";", a term may stand under several concepts. Words are compared as lowercase runs of letters and
    digits; from left to right the longest term wins and its words are used up.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises `InputRefused` with the line that is wrong."""
        self.terms: dict[tuple[str, ...], dict[str, frozenset[str]]] = {}
        self._longest = 0
        with path.open(encoding="utf-8", errors="strict") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    self._add(path, number, line.rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise InputRefused(f"{path}: not UTF-8 ({error}); expected a .tsv file") from error
        if not self.terms:
            raise InputRefused(f"{path}: no terms; expected lines of cui, types and term")

    def _add(self, path: Path, number: int, line: str) -> None:
        cells = tuple(line.split("\t"))
        if number == 1:
            if cells != HEADER:
                raise InputRefused(
                    f"{path}: header is {cells!r}; expected {HEADER!r}, tab-separated"
                )
            return
        if not line.strip():
            return
        types = cells[1].split(";") if len(cells) == 3 else []
        if (
            len(line) > MAX_LINE
            or len(cells) != 3
            or not _CUI.fullmatch(cells[0])
            or not all(_TYPE.fullmatch(t) for t in types)
        ):
            raise InputRefused(
                f"{path}, line {number}: expected a concept (C and 7 digits), semantic types (T and 3 "
                "digits, joined by ;) and a term, tab-separated"
            )
        term = tuple(words(cells[2]))
        if term:
            here = self.terms.setdefault(term, {})
            here[cells[0]] = here.get(cells[0], frozenset()) | frozenset(types)
            self._longest = max(self._longest, len(term))

    def concepts(self, text: str) -> Found:
        """Concepts of the text's longest terms."""
        said, found, i = words(text), dict[str, frozenset[str]](), 0
        while i < len(said):
            for size in range(min(self._longest, len(said) - i), 0, -1):
                here = self.terms.get(tuple(said[i : i + size]))
                if here:
                    found |= here
                    i += size
                    break
            else:
                i += 1
        return found


class MedCat:
    """Concepts by a MedCAT model pack.

    A pack holds pickles, which run code when loaded: use one from its maker only. Packs need a UMLS
    licence and are not shipped.
    """

    def __init__(self, path: Path) -> None:
        """Load the pack. Raises `EnvironmentLacks` without the medcat package."""
        require("medcat", "metrics")
        # By name: medcat comes without type information.
        self._cat: Any = import_module("medcat.cat").CAT.load_model_pack(str(path))

    def concepts(self, text: str) -> Found:
        """Concepts that MedCAT links."""
        found: dict[str, frozenset[str]] = {}
        for entity in self._cat.get_entities(text)["entities"].values():
            types = frozenset(map(str, entity.get("type_ids") or ()))
            found[entity["cui"]] = found.get(entity["cui"], frozenset()) | types
        return found
