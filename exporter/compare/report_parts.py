"""What the reports of captioners and of tasks have in common: their frame, verdicts, sizes and origins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from exporter.compare import html
from exporter.compare.candidates import NOISE_FLOOR
from exporter.compare.verdict import Judged
from exporter.compare.wording import DASH, bound_text, megabytes, verdict_lines


class ModelRow(Protocol):
    """What the row of a model says of its files; `parts` and `bytes` in bytes."""

    @property
    def name(self) -> str:
        """The model's name in the comparison."""
        ...

    @property
    def model_sha256(self) -> str:
        """Digest of its folder."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the libraries that ran it."""
        ...

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by part."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        ...


def document(title: str, summary: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page; `sections` are (anchor, title, body)."""
    links = "".join(f'<li><a href="#{a}">{html.text(t)}</a></li>' for a, t, _ in sections)
    head = (
        f"<header><h1>{html.text(title)}</h1>\n<p>{html.text(summary)}</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n'
    )
    parts = "".join(html.section(*section) for section in sections)
    return html.page(title, f"{head}{parts}</main>\n")


def verdict_section(gates: Sequence[Judged]) -> str:
    """Each verdict with its reasons and a table of its quantities."""
    return "".join(_verdict(gate) for gate in gates)


def _verdict(gate: Judged) -> str:
    css = {"PASS": "none", "FAIL": "flipped"}.get(gate.verdict, "lost")
    first, *rest = verdict_lines(gate)
    items = "".join(f"<li>{html.text(line.strip())}</li>" for line in rest)
    rows = [
        (q.name, str(q.verdict), q.said, bound_text(q), str(q.images), str(q.patients),
         str(q.needed or DASH), q.method)
        for q in gate.quantities
    ]  # fmt: skip
    rows += [
        (name, DASH, f"not measured: {why}", DASH, DASH, DASH, DASH, DASH)
        for name, why in gate.not_measured.items()
    ]
    _, unit = gate.counted()
    header = ("quantity", "verdict", "seen", "one-sided 95 % bounds and margin", unit, "patients",
              f"{unit} needed", "method")  # fmt: skip
    title = f"Gated quantities of {gate.candidate}, likeliest cause first"
    table = html.table(title, header, rows, words=4)
    return f'<p class="{css}">{html.text(first)}</p>\n<ul>{items}</ul>\n{table}'


def sizes_table(rows: Sequence[ModelRow]) -> str:
    """Bytes on disk by part of every model."""
    parts = sorted({part for row in rows for part in row.parts})
    sizes = [
        (row.name, *(megabytes(row.parts.get(p)) for p in parts), megabytes(row.bytes))
        for row in _models(rows)
    ]
    return html.table("Megabytes on disk by part", ("model", *parts, "all"), sizes)


def lineage_list(
    lineage: Mapping[str, Any], rows: Sequence[ModelRow], machine: Mapping[str, str]
) -> str:
    """Where the models come from and what ran them; nested values as JSON."""
    models = [(f"model {row.name}", row.model_sha256) for row in _models(rows)]
    versions = [(f"libraries ({row.name})", row.versions) for row in rows[:1]]
    whole: Sequence[tuple[str, Any]] = [
        *lineage.items(), *models, *versions, ("machine", machine),
    ]  # fmt: skip
    return html.definitions((name, _plain(value)) for name, value in whole)


def release_form(cases: str, blanks: Sequence[str]) -> str:
    """What the figures are no claim of, and lines for the person who signs; `cases` were compared."""
    lines = "".join(f"<dt>{b}</dt><dd><span class=blank>&nbsp;</span></dd>\n" for b in blanks)
    return (
        f"<p>These figures say how far a model moved from its reference on the {cases} named above. "
        "They are no claim of clinical performance or of conformity with any regulation.</p>\n"
        f'<dl class="method">{lines}</dl>\n'
    )


def _models(rows: Sequence[ModelRow]) -> Iterator[ModelRow]:
    return (row for row in rows if row.name != NOISE_FLOOR)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
