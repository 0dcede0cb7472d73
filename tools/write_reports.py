"""Write the shipped set of reports: ``python tools/write_reports.py``, or ``--check`` that it is so."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.core.digest import sha256_bytes  # noqa: E402

NAME = "reports-eval"
SEED = 20_261_122
PATIENTS, REPORTS = 80, 2
STATEMENT = "Invented texts: no report is about a person."
# Entities in the templates: [F a finding] and [A a part of the body].
TYPES = {"F": "finding", "A": "anatomy"}
_ENTITY = re.compile(r"\[([FA]) ([^\]]+)\]")


@dataclass(frozen=True)
class Lesion:
    """An abnormality: what the report says of it and what its summary does; both take its slots."""

    text: str
    summary: str


@dataclass(frozen=True)
class Examination:
    """One kind of examination; `normal` are sentences that any of its reports may have."""

    kind: str
    openings: tuple[str, ...]
    normal: tuple[str, ...]
    lesions: tuple[Lesion, ...]
    clear: str


EXAMINATIONS = (
    Examination(
        "x-ray",
        (
            "Frontal and lateral views of the chest.",
            "Portable chest radiograph, one view.",
            "Chest radiograph for {reason}.",
        ),
        (
            "The [A heart] is of normal size.",
            "The [A mediastinum] is not widened.",
            "No [F pneumothorax] is seen.",
            "The [A ribs] are intact.",
            "No [F consolidation] in either [A lung].",
        ),
        (
            Lesion(
                "There is a {grade} {side} [F pleural effusion] with [F atelectasis] of the {side} "
                "[A lower lobe].",
                "{Grade} {side} pleural effusion with atelectasis of the lower lobe.",
            ),
            Lesion(
                "A {size} mm [F nodule] projects over the {side} [A upper lobe].",
                "{size} mm nodule in the {side} upper lobe.",
            ),
            Lesion(
                "Patchy [F consolidation] is present in the {side} [A lower lobe], in keeping with "
                "[F pneumonia].",
                "Pneumonia of the {side} lower lobe.",
            ),
            Lesion(
                "{Grade} [F cardiomegaly] with [F pulmonary edema] at both [A lung bases].",
                "{Grade} cardiomegaly with pulmonary edema.",
            ),
        ),
        "No acute disease of the chest.",
    ),
    Examination(
        "ct",
        (
            "CT of the abdomen and pelvis with contrast.",
            "Contrast-enhanced CT of the abdomen for {reason}.",
            "CT of the abdomen, portal venous phase.",
        ),
        (
            "The [A spleen] is unremarkable.",
            "The [A pancreas] enhances evenly.",
            "There is no [F free fluid].",
            "No enlarged [A lymph nodes].",
            "The [A adrenal glands] are normal.",
        ),
        (
            Lesion(
                "A {size} mm [F calculus] lies in the {side} [A ureter] with {grade} "
                "[F hydronephrosis].",
                "{size} mm {side} ureteral calculus with {grade} hydronephrosis.",
            ),
            Lesion(
                "The [A liver] contains a {size} mm [F cyst] in the {side} [A hepatic lobe].",
                "{size} mm cyst in the {side} hepatic lobe.",
            ),
            Lesion(
                "{Grade} wall thickening of the [A appendix] with [F fat stranding], consistent with "
                "[F appendicitis].",
                "{Grade} appendicitis.",
            ),
            Lesion(
                "A solid [F mass] of {size} mm arises from the {side} [A kidney].",
                "{size} mm solid mass of the {side} kidney.",
            ),
        ),
        "No acute abnormality of the abdomen or pelvis.",
    ),
    Examination(
        "mri",
        (
            "MRI of the brain without contrast.",
            "MRI of the brain for {reason}.",
            "MRI of the brain, diffusion-weighted and FLAIR sequences.",
        ),
        (
            "The [A ventricles] are of normal width.",
            "No [F midline shift].",
            "The [A cerebellum] is unremarkable.",
            "There is no [F hemorrhage].",
            "The [A pituitary gland] is of normal size.",
        ),
        (
            Lesion(
                "Restricted diffusion in the {side} [A frontal lobe] in keeping with an acute "
                "[F infarct].",
                "Acute infarct of the {side} frontal lobe.",
            ),
            Lesion(
                "An enhancing [F meningioma] of {size} mm lies along the {side} [A convexity].",
                "{size} mm meningioma of the {side} convexity.",
            ),
            Lesion(
                "{Grade} [F white matter lesions] around both [A lateral ventricles].",
                "{Grade} periventricular white matter lesions.",
            ),
            Lesion(
                "A {side} [F subdural hematoma] is {size} mm thick and compresses the [A temporal "
                "lobe].",
                "{side} subdural hematoma, {size} mm thick.",
            ),
        ),
        "Normal MRI of the brain.",
    ),
    Examination(
        "ultrasound",
        (
            "Ultrasound of the neck.",
            "Ultrasound of the thyroid for {reason}.",
            "Ultrasound of the thyroid and the neck.",
        ),
        (
            "The [A isthmus] is not thickened.",
            "No suspicious [A cervical lymph nodes].",
            "No [F microcalcifications] are seen.",
            "The [A trachea] lies in the midline.",
            "Blood flow is even on Doppler.",
        ),
        (
            Lesion(
                "The {side} [A thyroid lobe] holds a {size} mm hypoechoic [F nodule].",
                "{size} mm hypoechoic nodule of the {side} thyroid lobe.",
            ),
            Lesion(
                "A {size} mm colloid [F cyst] in the {side} [A thyroid lobe].",
                "{size} mm colloid cyst of the {side} thyroid lobe.",
            ),
            Lesion("{Grade} [F goiter] of the whole [A thyroid gland].", "{Grade} goiter."),
            Lesion(
                "A [F lymph node] of {size} mm with a thick cortex lies in the {side} [A neck].",
                "Suspicious {side} cervical lymph node of {size} mm.",
            ),
        ),
        "Normal ultrasound of the thyroid.",
    ),
)
# What a normal sentence would deny although it has another name.
SAYS_TOO = {
    "cardiomegaly": "heart",
    "subdural hematoma": "hemorrhage",
    "lymph node": "cervical lymph nodes",
    "goiter": "isthmus",
}
SLOTS = {
    "reason": ("pain", "fever", "follow-up", "weight loss", "a fall"),
    "side": ("left", "right"),
    "grade": ("mild", "moderate", "severe"),
    "size": ("6", "9", "12", "18", "24", "31"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "calibration" / NAME)
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    options = parser.parse_args()
    files = set_files()
    if options.check:
        different = [n for n, data in files.items() if (options.out / n).read_bytes() != data]
        if different:
            sys.exit(f"{options.out / different[0]} differs from what is written now")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (options.out / name).write_bytes(data)


def set_files() -> dict[str, bytes]:
    """The files of the set by name; the same bytes each time."""
    lines = [report(p, r) for p in range(PATIENTS) for r in range(REPORTS)]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    head = {
        "schema": 1,
        "kind": "text",
        "name": NAME,
        "version": "1",
        "statement": STATEMENT,
        "licence": "Apache-2.0",
        "samples": len(lines),
        "patients": PATIENTS,
        "samples_sha256": sha256_bytes(text),
    }
    return {"set.json": (json.dumps(head, indent=2) + "\n").encode(), "samples.jsonl": text}


def report(patient: int, number: int) -> dict[str, Any]:
    """One line of samples.jsonl. About one report in five is normal."""
    rng = np.random.default_rng([SEED, patient, number])
    exam = EXAMINATIONS[(patient + 2 * number + number * (patient // 4)) % len(EXAMINATIONS)]
    slots = {name: values[rng.integers(len(values))] for name, values in SLOTS.items()}
    slots["Grade"] = slots["grade"].capitalize()
    count = int(rng.integers(3, 5))
    order = np.sort(rng.permutation(len(exam.normal))[:count])
    sentences = [exam.normal[i] for i in order]
    normal = rng.random() < 0.2
    summary = exam.clear
    if not normal:
        lesion = exam.lesions[rng.integers(len(exam.lesions))]
        sentences = _without_contradiction(sentences, lesion.text)
        sentences.insert(int(rng.integers(len(sentences) + 1)), lesion.text)
        summary = lesion.summary
    opening = exam.openings[rng.integers(len(exam.openings))]
    marked = " ".join([opening, *sentences])
    text, entities = read_entities(_fill(marked, slots))
    told = _fill(summary, slots)
    return {
        "id": f"report-{patient:02d}-{number}",
        "text": text,
        "patient": f"reports-{patient:02d}",
        "kind": exam.kind,
        "summary": told[0].upper() + told[1:],
        "label": "normal" if normal else "abnormal",
        "entities": entities,
    }


def _without_contradiction(sentences: list[str], lesion: str) -> list[str]:
    """Without the normal sentences that name a finding or an organ of the lesion."""
    named = {name for _, name in _ENTITY.findall(lesion)}
    named |= {SAYS_TOO[name] for name in named & SAYS_TOO.keys()}
    return [s for s in sentences if not named & {name for _, name in _ENTITY.findall(s)}]


def _fill(text: str, slots: dict[str, str]) -> str:
    for name, value in slots.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def read_entities(marked: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without its marks, and what was marked."""
    text, entities, place = "", [], 0
    for match in _ENTITY.finditer(marked):
        text += marked[place : match.start()]
        entities.append(
            {"type": TYPES[match[1]], "start": len(text), "end": len(text) + len(match[2])}
        )
        text += match[2]
        place = match.end()
    return text + marked[place:], entities


if __name__ == "__main__":
    main()
