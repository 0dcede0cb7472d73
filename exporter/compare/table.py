"""The comparison as a table for a terminal, with the cases behind each figure below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from exporter.compare.gpu_report import gpu_note
from exporter.compare.records import Comparison, Row
from exporter.compare.robustness_report import robustness_note
from exporter.compare.verdict import GateReport, Judged
from exporter.compare.wording import (
    DASH,
    bound_text,
    flips,
    interval,
    megabytes,
    number,
    percent,
    shown_gates,
    small,
    smoke_note,
    verdict_lines,
)

WIDTH = 100
HEADER = (
    "model", "MB", "ratio", "TTFT ms", "tok/s", "peak MB",
    "ROUGE-1", "facts right", "flips", "KL mean", "top-1",
)  # fmt: skip


def comparison_table(comparison: Comparison) -> str:
    """The verdicts, the table and its footnotes; no trailing newline, at most 100 columns wide."""
    rows = [HEADER, *(table_cells(row) for row in comparison.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines = [*verdict_text(shown_gates(comparison.gates)), *lines]
    for note in _notes(comparison):
        lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def verdict_text(gates: Sequence[Judged]) -> list[str]:
    """The verdicts as wrapped lines with an empty one below; nothing where there is no verdict."""
    lines = []
    for gate in gates:
        for line in verdict_lines(gate):
            more = "    " if line.startswith(" ") else "  "
            lines += textwrap.wrap(line, WIDTH, subsequent_indent=more)
    return [*lines, ""] if lines else []


def gate_table(report: GateReport) -> str:
    """One screen: the verdict, then each quantity with its bounds and margin."""
    lines = verdict_text([report])
    for quantity in report.quantities:
        text = f"{quantity.verdict:<12}  {quantity.name}: {quantity.said}; {bound_text(quantity)}"
        if quantity.needed:
            text += f"; {quantity.needed} images would decide"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 14)
    for name, why in report.not_measured.items():
        lines.append(f"{'-':<12}  {name}: not measured, {why}")
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = cells
    return "  ".join(
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    )


def table_cells(row: Row) -> tuple[str, ...]:
    """One row of the table, as wide as `HEADER`."""
    speed, memory, truth, moved = row.speed, row.memory, row.truth, row.distribution
    return (
        row.name,
        megabytes(row.bytes) if row.parts else DASH,
        number(row.ratio, 2) if row.parts else DASH,
        number(speed.first_token) if speed else DASH,
        number(speed.tokens_per_second) if speed else DASH,
        megabytes(memory.peak) if memory else DASH,
        number(row.rouge1.value, 3) if row.rouge1 else DASH,
        f"{truth.right}/{truth.total}" if truth else DASH,
        flips(row),
        small(moved.kl_mean) if moved else DASH,
        percent(moved.top1_agreement, 2) if moved else DASH,
    )


def _notes(comparison: Comparison) -> list[str]:
    c = comparison
    kinds = ", ".join(f"{n} {name}" for name, n in c.modalities.items())
    first = (
        f"Cases: {c.images} images of {c.patients} patients ({kinds}); ground-truth captions: "
        f"{c.captioned}; reference: {c.reference}{smoke_note(c)}."
    )
    notes = [first]
    candidates = [row for row in c.rows if row.role == "candidate"]
    notes += [_differences(row) for row in candidates]
    notes += [said for row in candidates if (said := robustness_note(row))]
    notes += [said for row in c.rows if (said := gpu_note(row))]
    notes += [f"{n.capitalize()}: {c.method[n]}." for n in ("noise floor", "speed", "memory", "gpu")
              if n in c.method]  # fmt: skip
    notes.append(
        f"Flips: facts turned over against {c.reference} 'in' so many images. {c.method['intervals']}."
    )
    return notes


def _differences(row: Row) -> str:
    parts = []
    if row.rouge1_difference:
        parts.append(f"ROUGE-1 {interval(row.rouge1_difference, signed=True)}")
    for name in ("rougeL", "bleu4"):
        if name in row.caption_differences:
            less = interval(row.caption_differences[name], signed=True, cases=False)
            parts.append(f"{name} {less}")
    if row.recall_difference:
        parts.append(f"facts right {interval(row.recall_difference, share=True, signed=True)}")
    if row.moved:
        parts.append(f"images with a flip {interval(row.moved.flips, share=True)}")
    if row.distribution:
        d = row.distribution
        parts.append(
            f"KL {small(d.kl_mean)} (s.e. {small(d.kl_standard_error)}, {d.tokens} tokens, "
            f"{d.images} images), identical captions {d.identical}/{d.captions}"
        )
    return f"{row.name} minus reference: {'; '.join(parts)}."
