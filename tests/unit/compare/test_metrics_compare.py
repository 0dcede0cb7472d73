"""Caption metrics in a comparison: rows, differences, the report's tables."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from exporter.compare.assemble import Judge, rouge1_figures
from exporter.compare.caption_figures import MetricsAsked, judged_figures
from exporter.compare.caption_report import caption_tables
from exporter.compare.captions.run import MetricPaths
from exporter.compare.jobs import CaseResult
from exporter.compare.metrics import all_metrics
from exporter.compare.records import SCHEMA, Comparison, Length, Row
from exporter.core.cases import Case

TRUTHS = (
    "CT of the abdomen: 14 mm cyst in the left kidney.",
    "MRI of the brain.",
    None,
    "Chest X-ray.",
)
SAID = {
    "fp16": (*TRUTHS[:2], "x", "Chest X-ray."),
    "int4": ("CT of the abdomen: 14 mm cyst in the right kidney.", TRUTHS[1], "y", "A photo."),
}


def result(i: int, text: str | None) -> CaseResult:
    return CaseResult(f"c{i}", text or "", [1, 2], True, 9, 0.1, 0.2, 0.3, [0.01])


def comparison(asked: MetricsAsked) -> Comparison:
    cases = [Case(f"c{i}", Path(f"{i}.png"), f"p{i % 2}", "ct", t) for i, t in enumerate(TRUTHS)]
    results = {n: [result(i, t) for i, t in enumerate(texts)] for n, texts in SAID.items()}
    judge = Judge(cases, results["fp16"])
    judged = {name: judge.judge(found) for name, found in results.items()}
    captions, _ = judged_figures(judged, asked)
    rouge = rouge1_figures(judged["int4"], judged["fp16"])
    assert rouge is not None
    # The figures of the other tables, to the last bits of the bootstrap.
    for ours, theirs in zip(
        (captions["int4"].figures["rouge1"], captions["int4"].differences["rouge1"]),
        rouge,
        strict=True,
    ):
        assert (ours.value, ours.low, ours.high) == pytest.approx(
            (theirs.value, theirs.low, theirs.high), rel=1e-9
        )
        assert (ours.images, ours.patients) == (theirs.images, theirs.patients) == (3, 2)
    rows = tuple(
        Row(name, "reference" if name == "fp16" else "candidate", "r", 1, "0", {}, {}, 1, 1.0,
            Length(1, 1.0, 0), captions=f.figures, caption_differences=f.differences)
        for name, f in captions.items()
    )  # fmt: skip
    return Comparison(SCHEMA, "", "fp16", "p", 8, 4, 2, 3, {"ct": 4}, {}, {}, rows,
                      not_computed=captions["fp16"].not_computed)  # fmt: skip


def test_the_report_shows_each_figure_and_its_difference(tmp_path: Path) -> None:
    asked = MetricsAsked(
        ("rouge", "bleu", "bleurt"), (), MetricPaths({}, {"MEDEXPORT_METRICS": str(tmp_path)})
    )
    made = comparison(asked)
    assert made.rows[0].captions["bleu4"].value == pytest.approx(100)
    assert made.rows[0].caption_differences == {}
    assert made.rows[1].caption_differences["bleu1"].value < 0
    shown = caption_tables(made)
    assert shown.count("<table") == 2
    for name in ("rouge1", "rougeL", "bleu4", "sentence_bleu4"):
        assert shown.count(f">{name}<") == 2
    assert f"bleurt: not computed, looked for {tmp_path / 'bleurt'}" in shown
    again = msgspec.json.decode(msgspec.json.encode(made), type=Comparison)
    assert again == made


def test_without_ground_truth_there_is_nothing() -> None:
    case = Case("c0", Path("0.png"), "p", "ct", None)
    judged = {"a": Judge([case], [result(0, "x")]).judge([result(0, "x")])}
    captions, how = judged_figures(judged, MetricsAsked())
    assert (captions["a"].figures, how) == ({}, {})
    bare = Comparison(SCHEMA, "", "a", "p", 8, 1, 1, 0, {"ct": 1}, {}, {}, ())
    assert caption_tables(bare) == ""


def test_metrics_are_listed_once_with_what_they_need() -> None:
    rows = {m.name: m for m in all_metrics()}
    assert len(rows) == len(all_metrics())
    assert rows["rouge"].needs == ""
    assert rows["bertscore"].needs.endswith("medexport[build]")
    assert (
        rows["imageclef-spec"].needs == "similarity, bertscore, rouge, bleurt, concepts, alignscore"
    )
    assert all(m.seconds for m in rows.values() if m.name in ("rouge", "bleu", "alignscore"))
