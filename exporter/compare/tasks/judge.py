"""The gate of a task: the same rule as for captioners, other quantities and margins."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.catalog.schema import TaskGate
from exporter.compare.gate import rule
from exporter.compare.tasks.measure import Measured
from exporter.compare.tasks.records import TASK_SCHEMA, TaskGateReport, Unit
from exporter.compare.verdict import ENOUGH_IMAGES, Quantity


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
    ruling = rule(quantities)
    return TaskGateReport(
        schema=TASK_SCHEMA,
        candidate=name,
        reference=reference,
        verdict=ruling.verdict,
        reasons=ruling.reasons,
        smoke=smoke or len(patients) < ENOUGH_IMAGES,
        unit=unit,
        count=len(patients),
        patients=len(set(patients)),
        needed=ruling.needed,
        margins=gate,
        quantities=tuple(quantities),
        not_measured={n: q for n, q in measured.quantities.items() if isinstance(q, str)},
    )
