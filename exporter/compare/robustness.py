"""How much more a model's facts move under small perturbations of the image than the reference's."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.compare.assemble import Judge, Judged
from exporter.compare.perturb import PERTURBATIONS
from exporter.compare.proportions import paired_bounds, rate_bounds
from exporter.compare.quality.difference import FLIPPED, KEPT, compare_facts
from exporter.compare.records import Figure, Robustness
from exporter.compare.statistics import CONFIDENCE, Interval


def robustness_figures(
    own: Sequence[Judged], reference: Sequence[Judged], judge: Judge
) -> dict[str, Robustness]:
    """Per perturbation: the share of images on which the model's facts changed, and that less the
    reference's, paired by image.

    Each model is held to its own caption of the clean image, so that a worse one is not charged twice.
    Intervals are of 95 per cent: exact and Tango's, on the effective number of images where a
    patient's are alike. Empty when no image was perturbed. `own` may be the reference: no difference.
    """
    pairs = [
        (a, b) for a, b in zip(own, reference, strict=True) if a.said.perturbed and b.said.perturbed
    ]
    if not pairs:
        return {}
    patients = [a.case.patient for a, _ in pairs]

    def figure(interval: Interval) -> Figure:
        return Figure(interval.value, interval.low, interval.high, len(pairs), len(set(patients)))

    found = {}
    for name in (p.name for p in PERTURBATIONS):
        outcomes = [_outcomes(a, name, judge) for a, _ in pairs]
        moved = [bool(o - {KEPT}) for o in outcomes]
        base = [bool(_outcomes(b, name, judge) - {KEPT}) for _, b in pairs]
        found[name] = Robustness(
            changed=figure(rate_bounds(moved, patients, CONFIDENCE)),
            flipped=sum(FLIPPED in o for o in outcomes),
            difference=None
            if own is reference
            else figure(paired_bounds(moved, base, patients, CONFIDENCE)),
        )
    return found


def _outcomes(judged: Judged, name: str, judge: Judge) -> set[str]:
    clean, moved = judge.facts(judged.said.text), judge.facts(judged.said.perturbed[name])
    return {change.outcome for change in compare_facts(clean, moved)}
