"""The comparison of a task on one screen of a terminal."""

from __future__ import annotations

import textwrap

from exporter.compare.table import WIDTH, verdict_text
from exporter.compare.tasks.records import TaskComparison, TaskRow
from exporter.compare.tasks.wording import (
    candidates_of,
    ordered,
    shown,
    smoke_note,
)
from exporter.compare.wording import DASH, megabytes, number, shown_gates


def task_table(c: TaskComparison) -> str:
    """Verdicts, one column per model and one line per figure, then notes; 100 columns at most.

    Models beyond what the width holds are named; all are in compare.json.
    """
    lines = verdict_text(shown_gates(c.gates)) or [""]
    body = figure_rows(c)
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    fitting = 1
    while fitting < len(widths) and sum(widths[: fitting + 1]) + 2 * fitting <= WIDTH:
        fitting += 1
    for index, row in enumerate(body):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:fitting], widths[1:], strict=False)]
        lines.append("  ".join(cells).rstrip())
        if index == 0:
            lines.append("  ".join("-" * w for w in widths[:fitting]))
    hidden = body[0][fitting:]
    notes = [f"Not shown for want of width: {', '.join(hidden)}."] if hidden else []
    for note in (*notes, *_notes(c)):
        lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def figure_rows(c: TaskComparison) -> list[tuple[str, ...]]:
    """A header and one row per figure, a column per model."""
    names = ordered(n for row in c.rows for n in row.figures)
    steps = ordered(s for row in c.rows if row.speed for s in row.speed.steps)
    rows = [("figure", *(row.name for row in c.rows))]
    rows += [(n, *(shown(r.figures.get(n), bounds=False) for r in c.rows)) for n in names]
    rows.append(("MB on disk", *(megabytes(r.bytes) for r in c.rows)))
    rows.append(("share of reference", *(number(r.ratio, 2) for r in c.rows)))
    rows += [(f"ms per {step}", *(_median(r, step) for r in c.rows)) for step in steps]
    if any(r.memory for r in c.rows):
        rows.append(("peak MB", *(megabytes(r.memory.peak) if r.memory else DASH for r in c.rows)))
    return rows


def _median(row: TaskRow, step: str) -> str:
    found = row.speed.steps.get(step) if row.speed else None
    return number(found.median, 2) if found else DASH


def _notes(c: TaskComparison) -> list[str]:
    kinds = ", ".join(f"{n} {name}" for name, n in c.kinds.items())
    first = (
        f"Cases: {c.count} {c.unit} of {c.patients} patients ({kinds}); reference: "
        f"{c.reference}{smoke_note(c)}."
    )
    notes = [first]
    for row in candidates_of(c):
        moved = "; ".join(
            f"{n} {shown(row.differences[n], signed=True)}" for n in ordered(row.differences)
        )
        if moved:
            notes.append(f"{row.name} minus reference: {moved}.")
    return [*notes, f"Intervals: {c.method['intervals']}."]
