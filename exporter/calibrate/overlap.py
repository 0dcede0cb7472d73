"""Calibration and evaluation must not share images or patients."""

from __future__ import annotations

from exporter.calibrate.imageset import ImageSet
from exporter.core.errors import InputRefused

SHOWN = 3


def refuse_overlap(calibration: ImageSet, evaluation: ImageSet) -> None:
    """Raise `InputRefused` when an image file's hash or a patient is in both sets, naming them.

    A quantized model that was calibrated on an image looks better on it than it is. Images are
    compared by their files: the same picture saved anew is found only through its patient.
    """
    hashes = {s.image_sha256: s.id for s in calibration.samples}
    images = [
        f"{hashes[s.image_sha256]} = {s.id}" for s in evaluation.samples if s.image_sha256 in hashes
    ]
    ours, theirs = ({s.patient for s in each.samples} for each in (calibration, evaluation))
    patients = sorted(ours & theirs)
    found = [
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for kind, names in (("images", images), ("patients", patients))
        if names
    ]
    if found:
        raise InputRefused(
            f"calibration set '{calibration.name}' and evaluation set '{evaluation.name}' share "
            f"{' and '.join(found)}; expected none: choose another calibration set or split"
        )
