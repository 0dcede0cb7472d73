"""Perturbation robustness in words: the report's table, the terminal's notes, the method."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.compare import html
from exporter.compare.perturb import PERTURBATIONS
from exporter.compare.records import Comparison, Row
from exporter.compare.wording import DASH, interval

NOT_GATED = "not gated: the verdict does not depend on it"


def robustness_section(comparison: Comparison) -> str:
    """One table row per model and perturbation; nothing when no image was perturbed."""
    cells = [
        (
            row.name,
            name,
            interval(found.changed, share=True, cases=False),
            str(found.flipped),
            interval(found.difference, share=True, signed=True, cases=False)
            if found.difference
            else DASH,
            str(found.changed.images),
            str(found.changed.patients),
        )
        for row in comparison.rows
        for name, found in row.robustness.items()
    ]
    if not cells:
        return ""
    header = ("model", "perturbation", "facts changed", "images with a flip", "less the reference",
              "images", "patients")  # fmt: skip
    said = (
        "Captions of slightly changed images against the same model's captions of the clean images; "
        f"{NOT_GATED}."
    )
    title = "Images whose facts changed, 95 % intervals; differences are paired"
    return f"<p>{html.text(said)}</p>\n{html.table(title, header, cells, words=2)}"


def robustness_note(row: Row) -> str:
    """One candidate's differences from the reference; empty when no image was perturbed."""
    parts = [
        f"{name} {interval(found.difference, share=True, signed=True, cases=False)}"
        for name, found in row.robustness.items()
        if found.difference
    ]
    if not parts:
        return ""
    first = next(iter(row.robustness.values())).changed
    return (
        f"{row.name} on perturbed images, facts changed minus reference: {'; '.join(parts)} "
        f"({first.images} images, {first.patients} patients; not gated)."
    )


def robustness_method(rows: Sequence[Row]) -> dict[str, str]:
    """How it was measured, for the method lines; empty when it was not."""
    if not any(row.robustness for row in rows):
        return {}
    listed = "; ".join(f"{p.name}: {p.said}" for p in PERTURBATIONS)
    return {
        "robustness": (
            f"images spread over the set, captioned again under {listed}. Changed: a fact lost, added "
            "or flipped against the same model's caption of the clean image. Clopper-Pearson and, for "
            "paired differences, Tango intervals, 95 %, on the effective number of images where a "
            f"patient's are alike; {NOT_GATED}"
        )
    }
