"""The gated quantities, from what both models said of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import msgspec
import numpy as np

from exporter.catalog.schema import Gate
from exporter.compare.assemble import Judged
from exporter.compare.decide import Sums, mean, paired_share, rate, rule
from exporter.compare.proportions import tango_bounds
from exporter.compare.quality.difference import FLIPPED
from exporter.compare.quality.loops import has_loop
from exporter.compare.verdict import Quantity

Pairs = Sequence[tuple[Judged, Judged]]
NO_TRUTH = "no ground-truth captions"
NO_PROBES = "no case was captioned with a blank image"


def gated_quantities(
    own: Sequence[Judged], reference: Sequence[Judged], gate: Gate
) -> tuple[list[Quantity], dict[str, str]]:
    """All quantities that could be measured, in the order of cause, and why others could not.

    Cause before effect: a model that does not see its image also loses facts, so image use stands
    first; damage that moves tokens everywhere stands before the facts it turns over.
    """
    pairs = list(zip(own, reference, strict=True))
    found: dict[str, Quantity | str] = {
        "tokenizer": _tokenizer(pairs),
        "image use": _image_use(pairs, gate),
        "distribution": _distribution(pairs, gate),
        "truncation": _truncation(pairs, gate),
        "distinct captions": _distinct(pairs, gate),
        "length": _length(pairs, gate),
        "repetition": _repetition(pairs, gate),
        "flips": _flips(pairs, gate),
        "contradictions": _contradictions(pairs, gate),
        "facts right": _facts_right(pairs, gate),
        "ROUGE-1": _rouge(pairs, gate),
    }
    if not _broad(pairs, gate):
        # A few tokens moved far: what they say (flips, facts) tells more than the mean does.
        found["distribution"] = found.pop("distribution")
    quantities = [q for q in found.values() if isinstance(q, Quantity)]
    return quantities, {name: q for name, q in found.items() if isinstance(q, str)}


def _patients(pairs: Pairs) -> list[str]:
    return [own.case.patient for own, _ in pairs]


def _tokenizer(pairs: Pairs) -> Quantity | str:
    probed = [(a, b) for a, b in pairs if a.said.probe and b.said.probe]
    if not probed:
        return NO_PROBES
    heard = sum(a.said.probe.prompt != b.said.probe.prompt for a, b in probed)  # type: ignore[union-attr]
    told = sum(
        a.said.probe.retold is not None and a.said.probe.retold != b.said.text  # type: ignore[union-attr]
        for a, b in probed
    )
    if heard:
        said = f"the same image and prompt become other input tokens in {heard} of {len(probed)}"
    elif told:
        said = f"the same tokens become another text in {told} of {len(probed)} captions"
    else:
        said = f"same input tokens and same texts in {len(probed)} of {len(probed)} cases"
    return rule("tokenizer", max(heard, told), len(probed), len(set(_patients(probed))), said)


def _image_use(pairs: Pairs, gate: Gate) -> Quantity | str:
    probed = [(a, b) for a, b in pairs if a.said.probe and b.said.probe]
    if not probed:
        return NO_PROBES
    own, base = ([uses_image(pair[side]) for pair in probed] for side in (0, 1))
    said = (
        f"{len(own) - sum(own)} of {len(own)} captions are what a blank image gets, "
        f"{len(base) - sum(base)} of the reference's"
    )
    blind = _blind_modalities(probed, own, base, gate.image_use_loss)
    if blind:
        said = f"captions of {', '.join(blind)} no longer depend on the image; {said}"
    return _worse_where(
        paired_share("image use", own, base, _patients(probed), (-gate.image_use_loss, None), said),
        blind,
    )


def uses_image(judged: Judged) -> bool:
    """Whether the caption differs from the one for a blank image of the same size."""
    probe = judged.said.probe
    return probe is not None and probe.blank[: len(judged.said.tokens)] != judged.said.tokens


def _distinct(pairs: Pairs, gate: Gate) -> Quantity | str:
    own, base = (distinct_captions([pair[side] for pair in pairs]) for side in (0, 1))
    said = (
        f"{len(own) - sum(own)} of {len(own)} captions are also another patient's, "
        f"{len(base) - sum(base)} of the reference's"
    )
    same = _blind_modalities(pairs, own, base, gate.distinct_loss)
    if same:
        said = f"captions of {', '.join(same)} are the same for different patients; {said}"
    margin = (-gate.distinct_loss, None)
    return _worse_where(
        paired_share("distinct captions", own, base, _patients(pairs), margin, said), same
    )


def distinct_captions(judged: Sequence[Judged]) -> list[bool]:
    """For each caption whether no other patient has the same one."""
    patients: dict[tuple[int, ...], set[str]] = {}
    for j in judged:
        patients.setdefault(tuple(j.said.tokens), set()).add(j.case.patient)
    return [len(patients[tuple(j.said.tokens)]) == 1 for j in judged]


def _blind_modalities(
    pairs: Pairs, own: Sequence[bool], base: Sequence[bool], margin: float
) -> list[str]:
    """Modalities in which the whole interval lies beyond the margin, at 5 per cent for all together."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for (judged, _), a, b in zip(pairs, own, base, strict=True):
        groups.setdefault(judged.case.modality, []).append((a, b))
    blind = []
    for name, group in groups.items():
        gained, lost = (sum(x and not y for x, y in g) for g in (group, [p[::-1] for p in group]))
        # Bonferroni: any of several modalities may fail the whole.
        _, high = tango_bounds(gained, lost, len(group), 1 - 2 * 0.05 / len(groups))
        if high < -margin:
            blind.append(name)
    return blind


def _worse_where(quantity: Quantity, modalities: Sequence[str]) -> Quantity:
    """FAIL when a modality fails, whatever the others say."""
    if not modalities:
        return quantity
    return msgspec.structs.replace(quantity, verdict="FAIL", needed=None)


def _truncation(pairs: Pairs, gate: Gate) -> Quantity | str:
    if any(pair[side].said.stopped is None for pair in pairs for side in (0, 1)):
        return "predictions do not say whether they were cut"
    own, base = ([not pair[side].said.stopped for pair in pairs] for side in (0, 1))
    said = f"{sum(own)} of {len(own)} captions cut before their end, {sum(base)} of the reference's"
    margin = (None, gate.truncation_rise)
    return paired_share("truncation", own, base, _patients(pairs), margin, said)


def _length(pairs: Pairs, gate: Gate) -> Quantity | str:
    own, base = ([len(pair[side].said.tokens) for pair in pairs] for side in (0, 1))
    if not sum(base):
        return "the reference says nothing"
    difference = [float(a - b) for a, b in zip(own, base, strict=True)]
    said = f"{sum(own)} tokens, the reference {sum(base)}"
    margin = (gate.length_low, gate.length_high)
    sums = Sums(difference, [float(b) for b in base], _patients(pairs))
    return mean("length", sums, margin, said, unit=1.0, shift=1.0, share=True)


def _repetition(pairs: Pairs, gate: Gate) -> Quantity:
    own, base = ([has_loop(pair[side].said.tokens) for pair in pairs] for side in (0, 1))
    said = f"{sum(own)} of {len(own)} captions repeat themselves, {sum(base)} of the reference's"
    margin = (None, gate.repetition_rise)
    return paired_share("repetition", own, base, _patients(pairs), margin, said)


def _flips(pairs: Pairs, gate: Gate) -> Quantity:
    events = [own.flips > 0 for own, _ in pairs]
    kinds = Counter(c.kind for own, _ in pairs for c in own.moved if c.outcome == FLIPPED)
    said = f"{sum(events)} of {len(events)} images with a fact turned over"
    if kinds:
        said += f" ({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})"
    return rate("flips", events, _patients(pairs), gate.flip_rate, said)


def _with_truth(pairs: Pairs) -> Pairs:
    return [(a, b) for a, b in pairs if a.truth is not None and b.truth is not None]


def _contradictions(pairs: Pairs, gate: Gate) -> Quantity | str:
    known = _with_truth(pairs)
    if not known:
        return NO_TRUTH
    own, base = (
        [any(c.outcome == FLIPPED for c in pair[side].truth or ()) for pair in known]
        for side in (0, 1)
    )
    said = (
        f"{sum(own)} of {len(own)} images contradict the ground truth, {sum(base)} by the reference"
    )
    margin = (None, gate.contradiction_rise)
    return paired_share("contradictions", own, base, _patients(known), margin, said)


def _facts_right(pairs: Pairs, gate: Gate) -> Quantity | str:
    counts = [(a.truth_counts, b.truth_counts, a) for a, b in pairs]
    known = [(a, b, j) for a, b, j in counts if a is not None and b is not None]
    totals = [float(a.total) for a, _, _ in known]
    if not sum(totals):
        return NO_TRUTH
    right, before = sum(a.kept for a, _, _ in known), sum(b.kept for _, b, _ in known)
    said = f"{right} of {sum(totals):.0f} facts right, {before} by the reference"
    lost = [float(a.kept - b.kept) for a, b, _ in known]
    sums = Sums(lost, totals, [j.case.patient for _, _, j in known])
    margin = (-gate.facts_right_loss, None)
    return mean("facts right", sums, margin, said, unit=1.0, share=True)


def _scored(pairs: Pairs) -> list[Judged]:
    return [own for own, _ in pairs if own.said.scores is not None]


def _broad(pairs: Pairs, gate: Gate) -> bool:
    """Whether a quarter of the tokens, not only a few of them, moved further than the mean may."""
    kl = [value for own in _scored(pairs) for value in own.kl]
    return bool(kl) and float(np.quantile(kl, 0.75)) > gate.kl_mean


def _distribution(pairs: Pairs, gate: Gate) -> Quantity | str:
    scored = _scored(pairs)
    if not scored:
        return "no logits of the reference to compare with"
    kl = [value for own in scored for value in own.kl]
    said = f"KL mean {np.mean(kl):.3g}, median {np.median(kl):.3g} nat over {len(kl)} tokens"
    if _broad(pairs, gate):
        said += ": tokens moved everywhere, as with damaged weights or another model"
    sums = Sums(
        [sum(own.kl) for own in scored],
        [float(len(own.kl)) for own in scored],
        [own.case.patient for own in scored],
    )
    return mean("distribution", sums, (None, gate.kl_mean), said)


def _rouge(pairs: Pairs, gate: Gate) -> Quantity | str:
    scores = [(a.rouge1, b.rouge1, a) for a, b in pairs]
    known = [(a, b, j) for a, b, j in scores if a is not None and b is not None]
    if not known:
        return NO_TRUTH
    own, base = fmean(a for a, _, _ in known), fmean(b for _, b, _ in known)
    said = f"{own:.3f}, the reference {base:.3f}"
    patients = [j.case.patient for _, _, j in known]
    sums = Sums([a - b for a, b, _ in known], [1.0] * len(known), patients)
    return mean("ROUGE-1", sums, (-gate.rouge1_loss, None), said)
