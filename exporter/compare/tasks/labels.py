"""Which labels a set of images is scored by, and what is true of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.compare.quality.facts import extract_facts
from exporter.compare.tasks.measure import Annotation
from exporter.core.cases import Case

# An area under a curve of fewer cases on one side says next to nothing.
FEWEST = 5
MOST_FINDINGS = 40
UNKNOWN = ("", "unknown", "other")
FINDINGS_METHOD = (
    "Findings are the set's annotations or, without them, what the ground-truth captions state: "
    "present is true, absent or not mentioned false, possible and past not scored; those on fewer "
    f"than {FEWEST} images with or without it are left out"
)


@dataclass(frozen=True)
class Labels:
    """Modalities exclude each other, findings do not; arrays are bool ``[images]`` by label."""

    modalities: tuple[str, ...]
    findings: tuple[str, ...]
    positive: Mapping[str, NDArray[np.bool_]]
    known: Mapping[str, NDArray[np.bool_]]

    @property
    def prompts(self) -> tuple[str, ...]:
        """What to embed: the modalities, then each finding and its denial."""
        return (*self.modalities, *(p for f in self.findings for p in (f, f"no {f}")))


def ground_truth(cases: Sequence[Case], annotations: Mapping[str, Annotation]) -> Labels:
    """Labels of a set that have enough cases on both sides, and their truth."""
    kinds = [c.modality for c in cases]
    named = {m for m in kinds if m not in UNKNOWN}
    positive = {m: np.array([k == m for k in kinds]) for m in sorted(named)}
    known = {m: np.array([k in named for k in kinds]) for m in positive}
    modalities = [m for m in positive if _enough(positive[m], known[m])]
    if len(modalities) < 2:
        modalities = []
    stated = [_stated(c, annotations.get(c.id)) for c in cases]
    findings = []
    for name in sorted({n for s in stated if s for n in s} - set(modalities)):
        truth = [None if s is None else s.get(name, False) for s in stated]
        positive[name] = np.array([t is True for t in truth])
        known[name] = np.array([t is not None for t in truth])
        if _enough(positive[name], known[name]):
            findings.append(name)
    findings.sort(key=lambda n: (-int(positive[n].sum()), n))
    return Labels(tuple(modalities), tuple(findings[:MOST_FINDINGS]), positive, known)


def _enough(positive: NDArray[np.bool_], known: NDArray[np.bool_]) -> bool:
    hits = int((positive & known).sum())
    return FEWEST <= hits <= int(known.sum()) - FEWEST


def _stated(case: Case, marked: Annotation | None) -> dict[str, bool | None] | None:
    """What is true of the image by finding (None: left open); None where nobody said anything."""
    if marked is not None and marked.labels:
        return dict(marked.labels)
    if case.caption is None:
        return None
    found: dict[str, bool | None] = {}
    for statement in extract_facts(case.caption).statements:
        truth = {"present": True, "absent": False}.get(statement.status)
        # Said twice with other statuses: one of the sides has it.
        found[statement.concept] = found.get(statement.concept) or truth
    return found
