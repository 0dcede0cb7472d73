"""RadGraph F1 (Delbrouck et al. 2022) from annotations that RadGraph wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.compare.captions.base import NotComputed, Pair, Tally, mean_tally
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json

LEVELS = ("simple", "partial", "complete")
Item = tuple[object, ...]
_SPACE = re.compile(r"\s+")


class RadGraph:
    """`CaptionMetric`: F1 of entities and relations of a chest report, in 0..1.

    RadGraph's own model is gated; this reads what it wrote: a JSON object of annotations, each with
    "text" and "entities" (tokens, label, relations), for the ground truths and the captions. Texts are
    matched without regard to white space, which RadGraph's tokenizer changes.
    """

    def __init__(self, path: Path) -> None:
        """Read the annotations. Raises `InputRefused`."""
        self._known: dict[str, dict[str, Any]] = {}
        for key, value in read_json(path).items():
            entities = value.get("entities") if isinstance(value, dict) else None
            if not isinstance(entities, dict) or not isinstance(value.get("text"), str):
                raise InputRefused(
                    f"{path}: annotation '{key}' has no text or no entities; expected RadGraph's output"
                )
            self._known[_bare(value["text"])] = _checked(path, key, entities)
        self.how = f"{len(self._known)} annotated texts; sets of entities and of relations"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally] | NotComputed:
        """Figures radgraph_simple, radgraph_partial and radgraph_complete."""
        lost = [
            t for p in pairs for t in (p.truth, p.said) if t.strip() and _bare(t) not in self._known
        ]
        if lost:
            return NotComputed(
                f"{len(lost)} texts have no annotation, first {lost[0][:60]!r}; annotate them with RadGraph"
            )
        scores: dict[str, list[float]] = {level: [] for level in LEVELS}
        for pair in pairs:
            truth, said = (self._known.get(_bare(t), {}) for t in (pair.truth, pair.said))
            for level in LEVELS:
                scores[level].append(reward(truth, said, level))
        return {f"radgraph_{level}": mean_tally(scores[level]) for level in LEVELS}


def reward(truth: Mapping[str, Any], said: Mapping[str, Any], level: str) -> float:
    """F1 of two sets of items from RadGraph entities; 0 where one side has no entity.

    simple: (tokens, label) of each entity; partial: the same and whether it has a relation; complete:
    (tokens, label) of an entity without relations, else (tokens, label, relation, tokens of the other
    entity) in lowercase for each of its relations.
    """
    if not truth or not said:
        return 0.0
    expected, found = items(truth, level), items(said, level)
    hits = len(expected & found)
    return 2 * hits / (len(expected) + len(found))


def items(entities: Mapping[str, Any], level: str) -> set[Item]:
    """What of one text is compared at `level`."""
    found: set[Item] = set()
    for entity in entities.values():
        tokens, label, relations = entity["tokens"], entity["label"], entity["relations"]
        if level == "simple" or not relations:
            found.add((tokens, label))
        elif level == "partial":
            found.add((tokens, label, True))
        else:
            for relation, other in relations:
                found.add((tokens.lower(), label, relation, entities[other]["tokens"].lower()))
    return found


def _bare(text: str) -> str:
    return _SPACE.sub("", text)


def _checked(path: Path, key: str, entities: dict[str, Any]) -> dict[str, Any]:
    for name, entity in entities.items():
        good = (
            isinstance(entity, dict)
            and isinstance(entity.get("tokens"), str)
            and isinstance(entity.get("label"), str)
            and isinstance(entity.get("relations"), list)
            and all(
                isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) and r[1] in entities
                for r in entity["relations"]
            )
        )
        if not good:
            raise InputRefused(
                f"{path}: entity '{name}' of '{key}' is not as RadGraph writes it; expected tokens, label "
                "and relations as pairs of a name and another entity's key"
            )
    return entities
