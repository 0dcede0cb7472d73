"""Faults injected into captions at known rates: what the comparison finds, and what it must not.

A swapped, denied or changed fact is found when the comparison reports a flip of that kind of fact.
A deleted sentence changes no fact into another one: it is found when facts are reported as lost.
A false alarm is any flip between an unchanged pair, or between a caption and a harmless paraphrase.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from exporter.compare.quality.difference import FLIPPED, KEPT, LOST, Change, compare_facts
from exporter.compare.quality.facts import Extraction, extract_facts
from tests.support.annotated import Annotated, annotated_captions, phantom_captions, table, wilson
from tests.support.faults import FAULTS, Injected, inject
from tests.support.paraphrases import REWRITES, paraphrases

SEED = "2026"
DELETED = "sentence deleted"


@cache
def read(text: str) -> Extraction:
    return extract_facts(text)


def changed(before: str, after: str) -> list[Change]:
    return [c for c in compare_facts(read(before), read(after)) if c.outcome != KEPT]


def flips(before: str, after: str) -> list[Change]:
    return [c for c in changed(before, after) if c.outcome == FLIPPED]


@cache
def captions() -> tuple[Annotated, ...]:
    return (*annotated_captions(), *phantom_captions())


@dataclass(frozen=True)
class Outcome:
    """One injected fault and whether the comparison found it."""

    injected: Injected
    split: str
    found: bool


@cache
def outcomes() -> tuple[Outcome, ...]:
    made = []
    for caption in captions():
        for fault in inject(caption, SEED):
            found = changed(fault.before, fault.after)
            if fault.kinds:
                hit = any(c.outcome == FLIPPED and c.kind in fault.kinds for c in found)
            else:
                hit = any(c.outcome == LOST for c in found)
            made.append(Outcome(fault, caption.split, hit))
    return tuple(made)


def rate(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{hits / total if total else 0:.4f} ({low:.4f} to {high:.4f})"


@cache
def fault_table() -> str:
    rows = []
    for fault in FAULTS:
        of_kind = [o for o in outcomes() if o.injected.fault == fault]
        mine = [o for o in of_kind if o.split == "development"]
        others = [o for o in of_kind if o.split != "development"]
        parts = (f"{sum(o.found for o in part)}/{len(part)}" for part in (mine, others))
        all_found = rate(sum(o.found for o in of_kind), len(of_kind))
        rows.append((fault, str(len(of_kind)), all_found, *parts))
    header = ("fault", "pairs", "found (Wilson 95 %)", "development", "other captions")
    return table(f"injected faults, seed {SEED}", header, rows)


def misses() -> str:
    lost = [o for o in outcomes() if not o.found and o.split != "held-out"]
    shown = [f"{o.injected.fault}: {o.injected.before} => {o.injected.after}" for o in lost]
    return "\n".join(["", *shown[:40]])


def test_at_least_2000_faults_of_each_kind_some() -> None:
    counts = Counter(o.injected.fault for o in outcomes())
    assert sum(counts.values()) >= 2000
    assert min(counts[f] for f in FAULTS) >= 50


def test_recall_of_flips() -> None:
    print(fault_table())
    turned = [o for o in outcomes() if o.injected.kinds]
    hits = sum(o.found for o in turned)
    print(f"all flips: {hits} of {len(turned)}, {rate(hits, len(turned))}")
    assert hits / len(turned) >= 0.98, fault_table() + misses()


@pytest.mark.parametrize("fault", FAULTS)
def test_recall_of_each_fault(fault: str) -> None:
    of_kind = [o for o in outcomes() if o.injected.fault == fault]
    assert sum(o.found for o in of_kind) / len(of_kind) >= 0.95, fault_table() + misses()


def test_a_deleted_sentence_is_lost_and_rarely_a_flip() -> None:
    deleted = [o.injected for o in outcomes() if o.injected.fault == DELETED]
    turned = [f"{d.before} => {d.after}" for d in deleted if flips(d.before, d.after)]
    print(f"\ndeleted sentences: {len(deleted)}, of which called a flip: {len(turned)}")
    assert len(turned) / len(deleted) < 0.02, turned


def test_an_unchanged_caption_has_no_change() -> None:
    alarms = [c.text for c in captions() if changed(c.text, c.text)]
    low, high = wilson(len(alarms), len(captions()))
    print(
        f"\nunchanged pairs: {len(captions())}, false alarms {len(alarms)} ({low:.4f} to {high:.4f})"
    )
    assert not alarms


@cache
def paraphrased() -> tuple[tuple[str, str, str], ...]:
    return tuple((n, c.text, t) for c in captions() for n, t in paraphrases(c).items())


def test_harmless_paraphrases_are_no_flips() -> None:
    total, turned, other = Counter[str](), Counter[str](), Counter[str]()
    shown = []
    for name, before, after in paraphrased():
        total[name] += 1
        turned[name] += bool(flips(before, after))
        other[name] += bool(changed(before, after))
        if flips(before, after):
            shown.append(f"{name}: {before} => {after}")
    rows = [
        (n, str(total[n]), str(turned[n]), str(other[n] - turned[n])) for n in REWRITES if total[n]
    ]
    report = table("harmless paraphrases", ("rewrite", "pairs", "flips", "other changes"), rows)
    print(report)
    alarms, pairs = sum(turned.values()), sum(total.values())
    print(f"false alarms: {alarms} of {pairs}, {rate(alarms, pairs)}")
    assert len(rows) >= 12
    assert alarms / pairs < 0.005, "\n".join([report, *shown])
    assert wilson(alarms, pairs)[1] < 0.005, report


@pytest.mark.parametrize("share", [0.02, 0.10, 0.30])
def test_the_flip_rate_is_the_injected_rate(share: float) -> None:
    """A whole comparison: faults at a known rate, the other pairs paraphrased or unchanged."""
    chance = random.Random(f"{SEED} {share}")
    injected = found = false = undamaged = 0
    for caption in captions():
        faults = [f for f in inject(caption, SEED) if f.kinds]
        if faults and chance.random() < share:
            injected += 1
            fault = chance.choice(faults)
            found += bool(flips(fault.before, fault.after))
        else:
            undamaged += 1
            kept = chance.choice([caption.text, *paraphrases(caption).values()])
            false += bool(flips(caption.text, kept))
    measured = (found + false) / (injected + undamaged)
    true = injected / (injected + undamaged)
    print(
        f"\ninjected {true:.4f}, measured {measured:.4f} ({found} of {injected} found, {false} false)"
    )
    assert injected >= 10
    assert abs(measured - true) <= 0.01


def test_the_same_seed_makes_the_same_faults() -> None:
    caption = phantom_captions()[0]
    assert inject(caption, "a") == inject(caption, "a")
    assert all(f.before != f.after for f in inject(caption, "b"))
