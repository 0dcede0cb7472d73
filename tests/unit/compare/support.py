"""Facts in the notation of `captions.py`."""

from __future__ import annotations

from exporter.compare.quality.facts import Fact, extract_facts


def notation(fact: Fact) -> str:
    if fact.kind in ("modality", "anatomy"):
        return f"{fact.kind} {fact.value}"
    if fact.kind in ("finding", "device"):
        return f"{fact.subject} {fact.value}"
    return f"{fact.subject}: {fact.value}"


def facts_of(caption: str) -> set[str]:
    return {notation(fact) for fact in extract_facts(caption).facts}
