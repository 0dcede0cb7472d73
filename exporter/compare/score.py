"""Predictions scored alone: no model is run, only texts are compared with ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from exporter.compare.assemble import Judge, rouge1_figures, truth_figures
from exporter.compare.jobs import CaseResult
from exporter.compare.records import Figure, Truth
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
    """Figures of predictions; `missing` cases of the set have no prediction and are not scored."""

    schema: int
    images: int
    patients: int
    missing: int
    rouge1: Figure
    truth: Truth | None


def read_predictions(path: Path) -> list[Prediction]:
    """Read JSON lines. Raises `InputRefused` with the line that is wrong, or on a repeated id."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected JSON lines") from error
    found: dict[str, Prediction] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError(f"{len(line)} bytes, expected at most {MAX_LINE}")
            prediction = msgspec.json.decode(line, type=Prediction)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InputRefused(
                f'{path}, line {number}: {error}; expected {{"id": ..., "caption": ...}}'
            ) from error
        if prediction.id in found:
            raise InputRefused(f"{path}, line {number}: id '{prediction.id}' stands there twice")
        found[prediction.id] = prediction
    if not found:
        raise InputRefused(f"{path}: no predictions; expected one JSON object per line")
    return list(found.values())


def score_predictions(
    predictions: Sequence[Prediction], cases: Sequence[Case] = ()
) -> PredictionScores:
    """ROUGE-1 and clinical facts of predictions against ground truth, with their intervals.

    Ground truth comes from the prediction's own line, or from the case with its id. Raises
    `InputRefused` for a prediction without either.
    """
    known = {case.id: case for case in cases}
    asked = [_case(p, known) for p in predictions]
    said = [CaseResult(p.id, p.caption, [], True, 0, 0.0, 0.0, 0.0, []) for p in predictions]
    judged = Judge(asked, said).judge(said)
    rouge, facts = rouge1_figures(judged, judged), truth_figures(judged, judged)
    if rouge is None:
        raise InputRefused(
            "no prediction has a ground-truth caption; expected 'truth' or --eval SET"
        )
    return PredictionScores(
        schema=SCORE_SCHEMA,
        images=len(asked),
        patients=len({c.patient for c in asked}),
        missing=len(known.keys() - {p.id for p in predictions}),
        rouge1=rouge[0],
        truth=facts[0] if facts else None,
    )


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
