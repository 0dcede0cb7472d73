"""Captions that another system wrote, beside the captions of models: texts only.

A file of JSON lines (``id``, ``caption``) stands in the comparison where a model would. Facts, ROUGE
and lengths are compared; what needs the model itself (distribution, image use, speed, memory) is
not, and every output says so; nor is truncation, which a text does not tell.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from exporter.compare.jobs import CaseResult, JobResult
from exporter.compare.score import read_predictions
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json

FILE = "predictions.jsonl"


def predictions_file(path: Path) -> Path | None:
    """The predictions of a file or folder; None when it holds none."""
    inside = path / FILE
    if inside.is_file():
        return inside
    return path if path.is_file() and path.suffix == ".jsonl" else None


def predicted_result(path: Path, reference: JobResult, tokenizer_folder: Path) -> JobResult:
    """The captions in `path` as if a process had given them, in the order of the reference's cases.

    Lengths are counted in the reference's tokens (``tokenizer_folder/tokenizer.json``); a caption that
    is word for word the reference's has its tokens. Raises `InputRefused` when a case has no prediction.
    """
    said = {p.id: p.caption for p in read_predictions(path)}
    missing = [c.id for c in reference.cases if c.id not in said]
    if missing:
        raise InputRefused(
            f"{path}: no prediction for {len(missing)} of {len(reference.cases)} cases, first "
            f"'{missing[0]}'; expected one line for each image of the evaluation set"
        )
    read_json(tokenizer_folder / "tokenizer.json")  # for its one-line errors and its size limit
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    cases = []
    for case in reference.cases:
        text = said[case.id].strip()
        ids = tokenizer.encode(f" {text}", add_special_tokens=False).ids
        tokens = case.tokens if text == case.text else list(ids)
        cases.append(CaseResult(case.id, text, tokens, None, 0, 0.0, 0.0, 0.0, []))
    return JobResult(
        job=sha256_file(path),
        load_seconds=0.0,
        peak_load=None,
        peak_run=None,
        unique=None,
        peak_was_reset=False,
        versions={},
        cases=cases,
    )
