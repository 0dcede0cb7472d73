"""Small pieces of HTML for the report: escaping, tables, pictures, the style sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from exporter.runtimes.images import open_image

LONGEST = 384
# Contrast of all text is at least 7:1 in both colour schemes (WCAG 2.2 AAA).
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --quiet: #4a525c; --line: #c9ced6;
  --soft: #f3f5f8; --bad: #8f1414; --warn: #6b4300; --good: #0b5a2b; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceff3; --paper: #15181c; --quiet: #c0c7d0;
  --line: #454d58; --soft: #20252b; --bad: #ffb3ad; --warn: #ffd79a; --good: #a8e6bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
p, dd, li { max-width: 48rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
a { color: inherit; } a:focus-visible, summary:focus-visible { outline: 3px solid currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding: .3rem 0; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { background: var(--soft); }
.case { display: grid; grid-template-columns: minmax(9rem, 16rem) 1fr; gap: 1rem; padding: 1rem;
  margin: 0 0 1rem; border: 1px solid var(--line); border-radius: .4rem; break-inside: avoid; }
.case img { width: 100%; height: auto; background: #000; }
.case dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; }
.case dt { color: var(--quiet); } .case dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
figure { margin: .5rem 0 1.2rem; } figcaption { font-weight: 700; margin-bottom: .3rem; }
.flipped { color: var(--bad); font-weight: 700; } .lost, .added { color: var(--warn); }
.none { color: var(--good); font-weight: 700; }
.blank { display: inline-block; min-width: 18rem; border-bottom: 1px solid var(--ink); }
dl.method dt { font-weight: 700; } dl.method dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .case { grid-template-columns: 1fr; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  h2 { break-after: avoid; } details > * { display: block; } }
""".strip()


def text(value: object) -> str:
    """`value` as escaped text."""
    return escape(str(value), quote=True)


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1
) -> str:
    """A table with a caption, column headers and a row header; cells are plain text.

    The first `words` columns hold words and are set left.
    """

    def mark(index: int) -> str:
        return ' class="text"' if index < words else ""

    head = "".join(f'<th scope="col"{mark(i)}>{text(h)}</th>' for i, h in enumerate(header))
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{mark(i)}>{text(c)}</td>" for i, c in enumerate(row[1:], 1))
        + "</tr>\n"
        for row in rows
    )
    # A scrolling region must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n"
    )


def section(anchor: str, title: str, body: str) -> str:
    """A section with a heading that the navigation links to."""
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{text(title)}</h2>\n{body}'
        "</section>\n"
    )


def definitions(values: Iterable[tuple[str, str]]) -> str:
    """A list of terms and their explanations."""
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>\n" for k, v in values)
    return f'<dl class="method">\n{items}</dl>\n'


def picture(path: Path, alt: str) -> str:
    """The image inside the page, at most `LONGEST` pixels on its longer side.

    Raises `InputRefused` when it is no image.
    """
    image = open_image(path)
    image.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{text(alt)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def page(title: str, body: str) -> str:
    """A whole document that loads nothing from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )
