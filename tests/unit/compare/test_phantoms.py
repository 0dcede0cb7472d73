"""The reader finds in every phantom's caption exactly what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from exporter.calibrate.phantoms.captions import report_caption, scene_facts
from exporter.calibrate.phantoms.scene import REGIONS, Kind, Region, new_scene
from exporter.calibrate.phantoms.stream import Stream
from exporter.calibrate.sets import open_set
from exporter.compare.quality.facts import extract_facts
from exporter.compare.quality.lexicon import read_lexicon
from exporter.core.data import data_root

SHIPPED = sorted(p.parent.name for p in data_root("calibration").glob("*/images"))


def canonical(kind: str, word: str) -> str:
    found = read_lexicon().canonical(kind, word)
    assert found is not None, f"the lexicon lacks the {kind} '{word}'"
    return found


def drawn(facts: Iterable[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Facts in the set's words as the reader's keys."""
    keys = set()
    for fact in facts:
        kind, value, of = fact["type"], fact["value"], fact["of"]
        if kind in ("finding", "device"):
            status = "absent" if fact["negated"] else "present"
            keys.add((kind, canonical(kind, value), status))
        elif kind in ("modality", "anatomy"):
            keys.add((kind, "", canonical(kind, value)))
        else:
            subject = read_lexicon().canonical("finding", of) or canonical("device", of)
            keys.add((kind, subject, value if kind == "measurement" else canonical(kind, value)))
    return keys


def check(caption: str, facts: Iterable[dict[str, Any]], organs: set[str]) -> None:
    expected, found = drawn(facts), {f.key for f in extract_facts(caption).facts}
    # The drawn facts name the region; the caption may also name the organ a finding lies in.
    extra = {value for kind, _, value in found - expected if kind == "anatomy"}
    assert extra <= organs, caption
    assert {k for k in found if k[0] != "anatomy" or k[2] not in extra} == expected, caption


def organs_of(regions: Iterable[Region]) -> set[str]:
    kinds: Iterator[Kind] = (kind for region in regions for kind in region.findings)
    names = {word for kind in kinds for word in (*kind.places, kind.organ) if word}
    return {canonical("anatomy", name) for name in names}


@pytest.mark.parametrize("region", REGIONS, ids=[f"{r.modality}-{r.anatomy}" for r in REGIONS])
def test_new_phantoms(region: Region) -> None:
    for number in range(200):
        scene = new_scene(region, Stream(f"lexicon {region.anatomy} {number}"))
        check(report_caption(scene), scene_facts(scene), organs_of([region]))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets(name: str) -> None:
    samples = open_set(name).samples
    assert samples
    for sample in samples:
        check(sample.caption, sample.facts, organs_of(REGIONS))


def test_the_reader_knows_every_word_that_can_be_drawn() -> None:
    for region in REGIONS:
        canonical("modality", region.modality)
        canonical("anatomy", region.anatomy)
        for kind in region.findings:
            assert canonical("finding", kind.name) == kind.name
            for grade in kind.grades:
                canonical("severity", grade)
        for kind in region.devices:
            assert canonical("device", kind.name) == kind.name
