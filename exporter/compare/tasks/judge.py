"""The gate of a task: the same rule as for captioners, other quantities and margins."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.catalog.schema import TaskGate
from exporter.compare.gate import ALL_INSIDE, overall
from exporter.compare.power import MOST
from exporter.compare.tasks.measure import Measured
from exporter.compare.tasks.records import TASK_SCHEMA, TaskGateReport, Unit
from exporter.compare.verdict import ENOUGH_IMAGES, Quantity
from exporter.compare.wording import bound_text


def judge_task(
    name: str,
    reference: str,
    measured: Measured,
    patients: Sequence[str],
    gate: TaskGate,
    *,
    unit: Unit,
    smoke: bool = False,
) -> TaskGateReport:
    """The verdict on one candidate: all quantities must pass, one that fails makes the whole fail."""
    quantities = [q for q in measured.quantities.values() if isinstance(q, Quantity)]
    verdict = overall(quantities)
    deciding = [q for q in quantities if q.verdict == verdict]
    if verdict == "INCONCLUSIVE":
        # What needs the most cases comes first: that many decide all.
        deciding.sort(key=lambda q: q.needed or MOST, reverse=True)
    known = [q.needed for q in deciding if q.needed is not None]
    undecided = verdict == "INCONCLUSIVE" and len(known) == len(deciding)
    reasons = (
        (ALL_INSIDE,)
        if verdict == "PASS"
        else tuple(f"{q.name}: {q.said}; {bound_text(q)}" for q in deciding)
    )
    return TaskGateReport(
        schema=TASK_SCHEMA,
        candidate=name,
        reference=reference,
        verdict=verdict,
        reasons=reasons,
        smoke=smoke or len(patients) < ENOUGH_IMAGES,
        unit=unit,
        count=len(patients),
        patients=len(set(patients)),
        needed=max(known) if undecided else None,
        margins=gate,
        quantities=tuple(quantities),
        not_measured={n: q for n, q in measured.quantities.items() if isinstance(q, str)},
    )
