"""The gate: pre-registered margins, one-sided bounds, three verdicts, the cause named first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.catalog.schema import Gate
from exporter.compare.assemble import Judged
from exporter.compare.power import MOST
from exporter.compare.quantities import gated_quantities
from exporter.compare.verdict import (
    ENOUGH_IMAGES,
    GATE_SCHEMA,
    GateReport,
    Quantity,
    Verdict,
)
from exporter.compare.wording import bound_text
from exporter.core.errors import GateFailed, GateInconclusive

ALL_INSIDE = "every gated quantity lies inside its margin"


def judge_candidate(
    name: str,
    reference: str,
    own: Sequence[Judged],
    base: Sequence[Judged],
    gate: Gate,
    *,
    smoke: bool = False,
) -> GateReport:
    """The verdict on one candidate.

    All quantities must pass, so that no correction for their number is needed: a bad candidate
    passes with at most 5 per cent whichever quantity is bad. One that fails makes the whole fail.
    """
    quantities, missing = gated_quantities(own, base, gate)
    ruling = rule(quantities)
    return GateReport(
        schema=GATE_SCHEMA,
        candidate=name,
        reference=reference,
        verdict=ruling.verdict,
        reasons=ruling.reasons,
        smoke=smoke or len(own) < ENOUGH_IMAGES,
        images=len(own),
        patients=len({j.case.patient for j in own}),
        needed=ruling.needed,
        margins=gate,
        quantities=tuple(quantities),
        not_measured=missing,
    )


@dataclass(frozen=True)
class Ruling:
    """What gated quantities say together: why, and how many cases would decide an inconclusive one
    (None: cannot be named).
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    needed: int | None


def rule(quantities: Sequence[Quantity]) -> Ruling:
    """The verdict over all quantities, which stand in the order of cause."""
    verdict = overall(quantities)
    if verdict == "PASS":
        return Ruling(verdict, (ALL_INSIDE,), None)
    deciding = [q for q in quantities if q.verdict == verdict]
    if verdict == "INCONCLUSIVE":
        # What needs the most cases comes first: that many decide all.
        deciding.sort(key=lambda q: q.needed or MOST, reverse=True)
    reasons = tuple(f"{q.name}: {q.said}; {bound_text(q)}" for q in deciding)
    known = [q.needed for q in deciding if q.needed is not None]
    undecided = verdict == "INCONCLUSIVE" and bool(known) and len(known) == len(deciding)
    return Ruling(verdict, reasons, max(known) if undecided else None)


def overall(quantities: Sequence[Quantity]) -> Verdict:
    """FAIL if any fails, else INCONCLUSIVE if any is, else PASS."""
    verdicts = {q.verdict for q in quantities}
    for verdict in ("FAIL", "INCONCLUSIVE"):
        if verdict in verdicts:
            return verdict
    return "PASS"


def enforce(report: GateReport, *, smoke: bool = False) -> None:
    """Raise `GateFailed` or `GateInconclusive` unless the candidate passed.

    With `smoke` (the user asked for a quick look) only a failure is an error: a look at a few images
    cannot pass, and that is known beforehand.
    """
    first = f"'{report.candidate}' against '{report.reference}': {report.label}: {report.reason}"
    if report.verdict == "FAIL":
        raise GateFailed(f"{first}; do not release it, see report.html for the images")
    if report.verdict == "INCONCLUSIVE" and not smoke:
        more = (
            f"{report.needed} images would decide"
            if report.needed
            else "no number of images is known"
        )
        raise GateInconclusive(f"{first}; {report.images} images are too few, {more}")
