"""The caption metrics of a comparison as tables of its report."""

from __future__ import annotations

from exporter.compare import html
from exporter.compare.records import Comparison
from exporter.compare.wording import DASH, interval, number


def caption_tables(comparison: Comparison) -> str:
    """Each metric's figure for every model, then the paired differences; nothing where none was made.

    Metrics that were asked for and not computed are named with what was looked for.
    """
    rows = [row for row in comparison.rows if row.captions]
    names = list(dict.fromkeys(name for row in rows for name in row.captions))
    missing = "".join(
        f"<li>{html.text(name)}: not computed, {html.text(why)}</li>"
        for name, why in comparison.not_computed.items()
    )
    listed = f"<ul>{missing}</ul>\n" if missing else ""
    if not names:
        return listed
    values = [
        (
            name,
            *(
                number(row.captions[name].value, 3) if name in row.captions else DASH
                for row in rows
            ),
        )
        for name in names
    ]
    said = html.table(
        "Caption metrics against ground truth", ("figure", *(row.name for row in rows)), values
    )
    others = [row for row in rows if row.caption_differences]
    less = [
        (
            name,
            *(
                interval(row.caption_differences[name], signed=True, cases=False)
                if name in row.caption_differences
                else DASH
                for row in others
            ),
        )
        for name in names
    ]
    if others:
        said += html.table(
            "Caption metrics less the reference's, paired, 95 % intervals over patients",
            ("figure", *(row.name for row in others)),
            less,
        )
    return said + listed
