"""Predictions scored alone: no model is run, only texts are compared with ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from exporter.compare.assemble import Judge, truth_figures
from exporter.compare.caption_figures import MetricsAsked, caption_figures
from exporter.compare.captions.base import Pair
from exporter.compare.jobs import CaseResult
from exporter.compare.records import CaseRow, Figure, Truth
from exporter.core.cases import Case
from exporter.core.errors import InputRefused

SCORE_SCHEMA = 1
MAX_LINE = 1 << 20


class Prediction(msgspec.Struct, frozen=True):
    """One line of a predictions file; further keys are ignored.

    `truth`, `patient` and `modality` may be left out where an evaluation set has them under `id`.
    """

    id: str
    caption: str
    truth: str | None = None
    patient: str | None = None
    modality: str | None = None


class PredictionScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures of predictions; `missing` cases of the set have no prediction and are not scored.

    `metrics` are caption metrics by figure, `how` their settings by metric, `not_computed` says what
    was looked for; `rouge1` is null when it was not asked for.
    """

    schema: int
    images: int
    patients: int
    missing: int
    rouge1: Figure | None
    truth: Truth | None
    metrics: dict[str, Figure] = {}
    not_computed: dict[str, str] = {}
    how: dict[str, str] = {}


class ModelScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Caption metrics of one model of a comparison; differences are less the reference, paired."""

    name: str
    metrics: dict[str, Figure]
    differences: dict[str, Figure]
    not_computed: dict[str, str]


class ComparisonScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Caption metrics of all models of a comparison, the reference first."""

    schema: int
    images: int
    patients: int
    models: tuple[ModelScores, ...]
    how: dict[str, str]


Line = TypeVar("Line", Prediction, CaseRow)


def read_predictions(path: Path) -> list[Prediction]:
    """Read JSON lines. Raises `InputRefused` with the line that is wrong, or on a repeated id."""
    return _read_lines(path, Prediction, '{"id": ..., "caption": ...}')


def read_cases(path: Path) -> list[CaseRow]:
    """Read the cases.jsonl of a comparison. Raises `InputRefused` with the line that is wrong."""
    return _read_lines(path, CaseRow, "a case as `medexport compare` writes it")


def _read_lines(path: Path, kind: type[Line], what: str) -> list[Line]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected JSON lines") from error
    found: dict[str, Line] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError(f"{len(line)} bytes, expected at most {MAX_LINE}")
            read = msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InputRefused(f"{path}, line {number}: {error}; expected {what}") from error
        if read.id in found:
            raise InputRefused(f"{path}, line {number}: id '{read.id}' stands there twice")
        found[read.id] = read
    if not found:
        raise InputRefused(f"{path}: no predictions; expected one JSON object per line")
    return list(found.values())


def score_predictions(
    predictions: Sequence[Prediction],
    cases: Sequence[Case] = (),
    asked: MetricsAsked | None = None,
) -> PredictionScores:
    """Caption metrics and clinical facts of predictions against ground truth, with their intervals.

    Ground truth comes from the prediction's own line, or from the case with its id. Raises
    `InputRefused` for a prediction without either or for unusable weights of a metric, `WrongUsage` for
    an unknown metric.
    """
    known = {case.id: case for case in cases}
    both = [_case(p, known) for p in predictions]
    said = [CaseResult(p.id, p.caption, [], True, 0, 0.0, 0.0, 0.0, []) for p in predictions]
    judged = Judge(both, said).judge(said)
    facts = truth_figures(judged, judged)
    pairs = [
        Pair(p.id, case.caption or "", p.caption, _image(case))
        for case, p in zip(both, predictions, strict=True)
    ]
    patients = [case.patient for case in both]
    figures, how = caption_figures({"": pairs}, patients, asked or MetricsAsked())
    return PredictionScores(
        schema=SCORE_SCHEMA,
        images=len(both),
        patients=len(set(patients)),
        missing=len(known.keys() - {p.id for p in predictions}),
        rouge1=figures[""].figures.get("rouge1"),
        truth=facts[0] if facts else None,
        metrics=figures[""].figures,
        not_computed=figures[""].not_computed,
        how=how,
    )


def score_comparison(
    rows: Sequence[CaseRow], cases: Sequence[Case] = (), asked: MetricsAsked | None = None
) -> ComparisonScores:
    """Caption metrics of every model in the cases of a comparison; the first model is the reference.

    Images come from the evaluation set's `cases`, by id. Rows without ground truth are left out. Raises
    as `score_predictions`, and `InputRefused` when models or ground truth are missing.
    """
    known = {case.id: case for case in cases}
    rows = [row for row in rows if row.truth is not None]
    if not rows:
        raise InputRefused("no case has a ground-truth caption; caption metrics need them")
    names = list(rows[0].captions)
    odd = next((row.id for row in rows if list(row.captions) != names), None)
    if odd is not None or not names:
        raise InputRefused(
            f"case '{odd}' has other models than the first; expected the same in all"
        )
    said = {
        name: [
            Pair(r.id, r.truth or "", r.captions[name].text,
                 _image(known[r.id]) if r.id in known else None)
            for r in rows
        ]
        for name in names
    }  # fmt: skip
    patients = [row.patient for row in rows]
    figures, how = caption_figures(said, patients, asked or MetricsAsked())
    models = tuple(
        ModelScores(n, f.figures, f.differences, f.not_computed) for n, f in figures.items()
    )
    return ComparisonScores(SCORE_SCHEMA, len(rows), len(set(patients)), models, how)


def _image(case: Case) -> Path | None:
    return case.image if case.image.name else None


def _case(prediction: Prediction, known: dict[str, Case]) -> Case:
    case = known.get(prediction.id)
    own = case.caption if case else None
    truth = prediction.truth if prediction.truth is not None else own
    if truth is None:
        raise InputRefused(
            f"prediction '{prediction.id}': no ground truth; expected its id in the evaluation set "
            "or a 'truth' of its own"
        )
    patient = prediction.patient or (case.patient if case else prediction.id)
    modality = prediction.modality or (case.modality if case else "unknown")
    return Case(prediction.id, case.image if case else Path(), patient, modality, truth)
