"""The comparison of a task as one HTML file: verdict first, then what changed, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.compare import html
from exporter.compare.report_parts import (
    document,
    lineage_list,
    release_form,
    sizes_table,
    verdict_section,
)
from exporter.compare.tasks.records import TaskCase, TaskComparison
from exporter.compare.tasks.table import figure_rows
from exporter.compare.tasks.wording import (
    TITLES,
    candidates_of,
    ordered,
    shown,
    smoke_note,
)
from exporter.compare.wording import (
    DASH,
    megabytes,
    number,
    percent,
    shown_gates,
    small,
)

# Cases of each candidate that are shown one by one.
SHOWN = 24
LONGEST_TEXT = 1500
BLANKS = (
    "Intended use and setting",
    "Acceptable difference, and why",
    "Changed cases reviewed by",
    "Decision and date",
)
Pictures = Mapping[str, Mapping[str, Path]]


def render_task_report(c: TaskComparison, lineage: Mapping[str, Any], pictures: Pictures) -> str:
    """One self-contained HTML document; `lineage` is shown as it is, nested values as JSON.

    `pictures`: drawn cases by candidate and case id; other cases show their image.
    """
    bodies = [
        ("verdict", "Verdict", verdict_section(shown_gates(c.gates))),
        ("summary", "Summary", _summary(c)),
        ("changed", "What changed", _changed(c, pictures)),
        ("labels", "By kind and label", _labels(c)),
        ("speed", "Speed, memory and size", _speed(c)),
        ("method", "How each figure was measured", html.definitions(c.method.items())),
        ("lineage", "Where it comes from", lineage_list(lineage, c.rows, c.machine)),
        ("release", "For the person who signs", release_form("cases", BLANKS)),
    ]
    sections = [(anchor, title, body) for anchor, title, body in bodies if body]
    return document(f"{TITLES[c.task]}: comparison with {c.reference}", c.summary, sections)


def shown_cases(c: TaskComparison, name: str) -> list[TaskCase]:
    """The cases of one candidate that a person should see: changed ones first, the farthest first."""
    moved = [x for x in c.cases if x.answers[name].changes or x.answers[name].distance > 0]
    moved.sort(key=lambda x: (not x.answers[name].changes, -x.answers[name].distance))
    return moved[:SHOWN]


def _summary(c: TaskComparison) -> str:
    kinds = ", ".join(f"{n} {name}" for name, n in c.kinds.items())
    said = f"{c.count} {c.unit} of {c.patients} patients ({kinds}).{smoke_note(c)}"
    if c.prompt:
        said += f" Words around the input: “{c.prompt}”."
    header, *rows = figure_rows(c)
    parts = [
        f"<p>{html.text(said)}</p>\n",
        html.table("All models; differences from the reference stand below", header, rows),
    ]
    names = ordered(n for row in c.rows for n in row.differences)
    others = [row for row in c.rows if row.role != "reference"]
    if names:
        cells = [
            (n, *(shown(row.differences.get(n), signed=True) for row in others)) for n in names
        ]
        parts.append(
            html.table(
                "Paired differences from the reference, 95 % intervals",
                ("figure", *(row.name for row in others)),
                cells,
            )
        )
    return "".join(parts)


def _changed(c: TaskComparison, pictures: Pictures) -> str:
    parts = []
    for row in candidates_of(c):
        changed = sum(bool(x.answers[row.name].changes) for x in c.cases)
        shown_here = shown_cases(c, row.name)
        css = "lost" if changed else "none"
        parts.append(
            f"<h3>{html.text(row.name)}</h3>\n"
            f'<p class="{css}">{changed} of {c.count} {c.unit} are answered otherwise than by '
            f"{html.text(c.reference)}; shown are the {len(shown_here)} that moved most.</p>\n"
        )
        drawn = pictures.get(row.name, {})
        parts += [_case(x, row.name, c.reference, drawn.get(x.id)) for x in shown_here]
    return "".join(parts) or "<p>There is no candidate.</p>\n"


def _case(case: TaskCase, name: str, reference: str, drawn: Path | None) -> str:
    own, base = case.answers[name], case.answers[reference]
    rows = [("case", f"{case.id}, patient {case.patient}, {case.kind}")]
    if case.text:
        cut = case.text[:LONGEST_TEXT] + ("..." if len(case.text) > LONGEST_TEXT else "")
        rows.append(("asked for" if case.image else "text", cut))
    rows += [(f"ground truth: {k}", v) for k, v in case.truth.items()]
    rows += [(reference, base.said or DASH), (name, own.said or DASH)]
    rows += [(k, f"{v:.4f}") for k, v in own.values.items()]
    items = "".join(f"<dt>{html.text(k)}</dt><dd>{html.text(v)}</dd>\n" for k, v in rows)
    items += "".join(f'<dt>changed</dt><dd class="lost">{html.text(x)}</dd>\n' for x in own.changes)
    picture = ""
    if drawn is not None:
        alt = f"{case.kind} image {case.id} with both masks; {'; '.join(own.changes) or own.said}"
        picture = html.picture(drawn, alt) + (
            "<p>Yellow: the reference's mask alone; blue: the candidate's alone; green: both.</p>"
        )
    elif case.image:
        alt = f"{case.kind} image {case.id}; the reference says: {base.said}"
        picture = html.picture(Path(case.image), alt)
    return f'<article class="case"><div>{picture}</div><dl>{items}</dl></article>\n'


def _labels(c: TaskComparison) -> str:
    first = c.row(c.reference).labels
    moved = [
        (row.name, kind, str(k.count), str(k.patients), str(k.changed), small(k.distance),
         small(k.worst))
        for row in c.rows
        for kind, k in row.kinds.items()
    ]  # fmt: skip
    kinds = ("model", "kind", c.unit, "patients", "changed", "mean distance", "largest")
    parts = [html.table("Distance from the reference's answers by kind", kinds, moved, words=2)]
    for figure in dict.fromkeys(f for label in first.values() for f in label.figures):
        rows = []
        for name, label in first.items():
            if figure not in label.figures:
                continue
            counts = [DASH if n is None else str(n) for n in (label.positives, label.negatives)]
            cells = [shown(row.labels[name].figures.get(figure)) for row in c.rows]
            rows.append((name, *counts, *cells))
        header = ("label", "with it", "without", *(row.name for row in c.rows))
        parts.append(html.table(f"{figure} by label, 95 % intervals", header, rows))
    return "".join(parts)


def _speed(c: TaskComparison) -> str:
    cells = [
        (
            row.name, step, number(t.median, 2), number(t.p90, 2), percent(t.spread, 0), str(t.runs),
            number(row.speed.load, 0), megabytes(row.memory.peak if row.memory else None),
        )
        for row in c.rows
        if row.speed
        for step, t in row.speed.steps.items()
    ]  # fmt: skip
    header = ("model", "step", "median ms", "p90 ms", "spread", "runs", "load ms", "peak MB")
    said = html.table("Medians; p90 only from 64 runs", header, cells, words=2) if cells else ""
    return said + sizes_table(c.rows)
