"""The comparison as one HTML file: what changed first, how it was measured, where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.compare import html
from exporter.compare.caption_report import caption_tables
from exporter.compare.gpu_report import gpu_table, held_on_gpu
from exporter.compare.plots import plots
from exporter.compare.records import CaptionRow, CaseRow, Comparison, Row
from exporter.compare.report_parts import (
    document,
    lineage_list,
    release_form,
    sizes_table,
    verdict_section,
)
from exporter.compare.robustness_report import robustness_section
from exporter.compare.table import HEADER, table_cells
from exporter.compare.tradeoff import TradeOff, tradeoff_section
from exporter.compare.wording import (
    DASH,
    flips,
    interval,
    megabytes,
    number,
    percent,
    shown_gates,
    small,
    smoke_note,
)

MAX_FLIPPED = 40
WORST = 4
MOST_FINDINGS = 30
SECTIONS = (
    ("verdict", "Verdict"),
    ("summary", "Summary"),
    ("changed", "What changed clinically"),
    ("worst", "Largest differences without a flip"),
    ("plots", "Cost against quality"),
    ("slices", "By modality and kind of fact"),
    ("robustness", "Slightly changed images"),
    ("speed", "Speed, memory and size"),
    ("tradeoff", "Bytes against quality"),
    ("method", "How each figure was measured"),
    ("lineage", "Where it comes from"),
    ("release", "For the person who signs"),
)
BLANKS = (
    "Intended use and setting",
    "Acceptable flip rate, and why",
    "Flips reviewed by",
    "Decision and date",
)


def render_report(
    comparison: Comparison,
    lineage: Mapping[str, Any],
    curves: Mapping[str, TradeOff] | None = None,
) -> str:
    """One self-contained HTML document; `lineage` is shown as it is, nested values as JSON.

    `curves`: the trade-off of each mixed model by its name.
    """
    bodies = {
        "verdict": verdict_section(shown_gates(comparison.gates))
        or "<p>No verdict: there is nothing to hold against the reference.</p>\n",
        "summary": _summary(comparison),
        "changed": _changed(comparison),
        "worst": _worst(comparison),
        "plots": plots(comparison) or "<p>Too little was measured to draw.</p>\n",
        "slices": _slices(comparison),
        "robustness": robustness_section(comparison),
        "speed": _speed(comparison),
        "tradeoff": "".join(tradeoff_section(n, c) for n, c in (curves or {}).items()),
        "method": html.definitions(comparison.method.items()),
        "lineage": lineage_list(lineage, comparison.rows, comparison.machine),
        "release": release_form("images", BLANKS),
    }
    # What was not asked for has no section.
    sections = [
        (anchor, title, bodies[anchor])
        for anchor, title in SECTIONS
        if bodies[anchor] or anchor not in ("tradeoff", "robustness")
    ]
    return document(f"Comparison with {comparison.reference}", comparison.summary, sections)


def _summary(c: Comparison) -> str:
    kinds = ", ".join(f"{n} {name}" for name, n in c.modalities.items())
    said = (
        f"{c.images} images of {c.patients} patients ({kinds}), {c.captioned} with a ground-truth "
        f"caption. Prompt: “{c.prompt}” At most {c.max_new_tokens} tokens.{smoke_note(c)}"
    )
    rows = [table_cells(row) for row in c.rows]
    main = html.table("All models; flips are facts turned over, in so many images", HEADER, rows)
    header = ("model", "ROUGE-1", "facts right", "images with a flip")
    differences = [
        (
            row.name,
            interval(row.rouge1_difference, signed=True) if row.rouge1_difference else DASH,
            interval(row.recall_difference, share=True, signed=True)
            if row.recall_difference
            else DASH,
            interval(row.moved.flips, share=True) if row.moved else DASH,
        )
        for row in c.rows
        if row.role != "reference"
    ]
    return (
        f"<p>{html.text(said)}</p>\n{main}"
        + html.table("Paired differences from the reference, 95 % intervals", header, differences)
        + caption_tables(c)
        + _distributions(c.rows)
    )


def _distributions(rows: Sequence[Row]) -> str:
    header = (
        "model", "KL mean", "s.e.", "median", "p99", "max", "top-1", "perplexity ratio",
        "identical captions", "first different token", "length ratio", "cut", "tokens", "images",
    )  # fmt: skip
    cells = [
        (
            row.name,
            *(small(v) for v in (d.kl_mean, d.kl_standard_error, d.kl_median, d.kl_p99, d.kl_max)),
            percent(d.top1_agreement, 2),
            number(d.perplexity_ratio, 4),
            f"{d.identical}/{d.captions}",
            number(d.first_divergent),
            number(row.length.ratio, 3),
            DASH if row.length.truncated is None else str(row.length.truncated),
            str(d.tokens),
            str(d.images),
        )
        for row in rows
        if (d := row.distribution)
    ]
    if not cells:
        return "<p>No token distribution was compared.</p>\n"
    return html.table("Token distributions on the reference's own captions", header, cells)


def _changed(c: Comparison) -> str:
    names = [row.name for row in c.rows if row.role == "candidate"]
    parts = []
    for name in names:
        row = c.row(name)
        if row.moved is None:
            continue
        m = row.moved
        parts.append(
            f"<h3>{html.text(name)}</h3>\n<p>Of the facts in the reference's captions "
            f"{m.kept} kept, {m.lost} lost, {m.flipped} flipped; {m.added} added. Flips: "
            f"{html.text(flips(row))} images.</p>\n"
        )
        cases = [x for x in c.cases if _flipped(x.captions[name])]
        parts += [_case(x, name, c.reference) for x in cases[:MAX_FLIPPED]]
        if not cases and c.cases:
            parts.append('<p class="none">No fact was flipped on any image.</p>\n')
        if len(cases) > MAX_FLIPPED:
            parts.append(f"<p>{len(cases) - MAX_FLIPPED} more are in cases.jsonl.</p>\n")
    return "".join(parts) or "<p>There is no candidate.</p>\n"


def _worst(c: Comparison) -> str:
    parts = []
    for name in [row.name for row in c.rows if row.role == "candidate"]:
        rest = [x for x in c.cases if not _flipped(x.captions[name]) and x.captions[name].kl_mean]
        rest.sort(key=lambda x: -(x.captions[name].kl_mean or 0.0))
        shown = rest[:WORST]
        if shown:
            parts.append(f"<h3>{html.text(name)}</h3>\n")
            parts += [_case(x, name, c.reference) for x in shown]
    return "".join(parts) or "<p>There is none.</p>\n"


def _flipped(caption: CaptionRow) -> bool:
    return any(change.outcome == "flipped" for change in caption.changes)


def _case(case: CaseRow, name: str, reference: str) -> str:
    own, base = case.captions[name], case.captions[reference]
    rows = [("image", f"{case.id}, patient {case.patient}, {case.modality}")]
    if case.truth is not None:
        rows.append(("ground truth", case.truth))
    rows += [(reference, base.text), (name, own.text)]
    if own.kl_mean is not None:
        rows.append(("mean KL", small(own.kl_mean)))
    items = "".join(f"<dt>{html.text(k)}</dt><dd>{html.text(v)}</dd>\n" for k, v in rows)
    ordered = sorted(own.changes, key=lambda change: change.outcome != "flipped")
    items += "".join(
        f'<dt>{html.text(x.outcome)}</dt><dd class="{x.outcome}">{html.text(x.text)}</dd>\n'
        for x in ordered
    )
    alt = f"{case.modality} image {case.id}; the reference says: {base.text}"
    shown = html.picture(Path(case.image), alt)
    return f'<article class="case"><div>{shown}</div><dl>{items}</dl></article>\n'


def _slices(c: Comparison) -> str:
    header = (
        "model",
        "modality",
        "images",
        "patients",
        "ROUGE-1",
        "facts right",
        "flips",
        "KL mean",
    )
    cells = [
        (
            row.name,
            modality,
            str(s.images),
            str(s.patients),
            number(s.rouge1, 3),
            DASH if s.right is None else f"{s.right}/{s.total}",
            str(s.flips),
            small(s.kl_mean),
        )
        for row in c.rows
        for modality, s in row.by_modality.items()
    ]
    said = html.table("Figures by modality", header, cells, words=2)
    truths = [(row.name, row.truth) for row in c.rows if row.truth]
    if truths:
        kinds = [k for k, (_, total) in truths[0][1].by_kind.items() if total]
        counts = [
            (name, *(f"{t.by_kind[k][0]}/{t.by_kind[k][1]}" for k in kinds)) for name, t in truths
        ]
        said += html.table("Facts right of the ground truth's, by kind", ("model", *kinds), counts)
        findings = list(truths[0][1].by_finding)[:MOST_FINDINGS]
        each = [(f, *(_share(t.by_finding.get(f)) for _, t in truths)) for f in findings]
        names = [name for name, _ in truths]
        said += html.table(
            "Facts right of the ground truth's, by finding or device", ("finding", *names), each
        )
    return said


def _share(counts: tuple[int, int] | None) -> str:
    return DASH if counts is None else f"{counts[0]}/{counts[1]}"


def _speed(c: Comparison) -> str:
    header = (
        "model", "load ms", "prepare ms", "vision ms", "TTFT ms", "TTFT p90", "ms/token", "tok/s",
        "total ms", "total p90", "spread", "runs", "peak MB", "unique MB", "GPU MB",
    )  # fmt: skip
    cells = [
        (
            row.name,
            *(number(v) for v in (s.load, s.prepare, s.vision, s.first_token, s.first_token_p90)),
            number(s.per_token, 2),
            *(number(v) for v in (s.tokens_per_second, s.total, s.total_p90)),
            percent(s.spread, 0),
            str(s.runs),
            megabytes(row.memory.peak if row.memory else None),
            megabytes(row.memory.unique if row.memory else None),
            megabytes(held_on_gpu(row)),
        )
        for row in c.rows
        if (s := row.speed)
    ]
    said = html.table("Medians; p90 only from 64 runs", header, cells) if cells else ""
    return said + gpu_table(c.rows) + sizes_table(c.rows)
