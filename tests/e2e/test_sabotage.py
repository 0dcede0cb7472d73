"""Broken models fail with the cause named first; honest ones pass; too few images decide nothing.

The models are asked in this process: what a process of its own adds is tested with the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import NormalDist

import pytest
from PIL.Image import Image

from exporter.adapters.merge import merge_adapters
from exporter.calibrate.sets import open_set
from exporter.catalog.profiles import find_model
from exporter.compare.assemble import Judge, Judged
from exporter.compare.gate import judge_candidate
from exporter.compare.power import images_for_rate
from exporter.compare.verdict import GateReport
from exporter.compare.worker import Probed
from exporter.core.cases import Case
from exporter.core.data import data_root
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from tests.support import sabotage
from tests.support.sabotage import Bench, Cut, Unseen, job_cases

DEMO = data_root("profiles") / "demo"
ADAPTERS = (DEMO / "adapter",)
# Broken models show it on fewer images than it takes to show that a model is not broken. The set's
# modalities follow each other in fours: a step of 4 or 12 would meet one of them only.
EVERY, ELEVENTH = 5, 11


@dataclass
class Lab:
    """The merged demo model, its exports, and the benches on all and on some of the images."""

    root: Path
    cases: tuple[Case, ...]
    prompt: str
    length: int
    benches: dict[int, Bench] = field(default_factory=dict)
    judges: dict[int, tuple[Judge, list[Judged]]] = field(default_factory=dict)

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def fp16(self) -> Path:
        return self.root / "fp16" / "model"

    def export(self, source: Path, name: str) -> Path:
        out = self.root / name
        out.mkdir()
        export_model(source, out)
        return out / "model"

    def quantize(self, scheme: str) -> Path:
        out = self.root / f"{scheme}-weights"
        if not out.exists():
            out.mkdir()
            quantize_model(self.merged, out, find_scheme(scheme), threads=1)
        return out

    def bench(self, step: int) -> tuple[Bench, Judge, list[Judged]]:
        """The reference asked about every `step`-th image, once."""
        if step not in self.benches:
            some = self.cases[: 20 * step : step] if step == ELEVENTH else self.cases[::step]
            named = job_cases([(c.id, c.image) for c in some])
            bench = Bench(self.root / f"bench-{step}", named, self.prompt, self.length)
            said = bench.ask_reference(self.fp16).cases
            judge = Judge(some, said)
            self.benches[step], self.judges[step] = bench, (judge, judge.judge(said))
        return self.benches[step], *self.judges[step]

    def verdict(self, name: str, captioner: Probed, step: int = EVERY) -> GateReport:
        bench, judge, base = self.bench(step)
        own = judge.judge(bench.ask(name, captioner).cases)
        report = judge_candidate(name, "fp16", own, base, find_model("demo").gate)
        print(f"\n{name}: {report.label}: " + " // ".join(report.reasons))
        return report

    def altered(self, name: str, change: Callable[[sabotage.Tensors], None]) -> Probed:
        folder = sabotage.altered(self.merged, self.root / f"{name}-weights", change)
        return OrtCaptioner(self.export(folder, name), threads=1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    images, profile = open_set("phantoms-eval"), find_model("demo")
    made = Lab(root, images.cases(), profile.prompts.default, profile.max_new_tokens)
    made.merged.mkdir()
    merge_adapters(DEMO / "model", ADAPTERS, made.merged)
    made.export(made.merged, "fp16")
    return made


def failed(report: GateReport, quantity: str) -> str:
    """The first reason of a failure, which must be about `quantity`."""
    assert report.verdict == "FAIL", report.label
    assert report.reason.startswith(f"{quantity}: "), report.reasons
    return report.reason


def test_fp16_against_itself_passes(lab: Lab) -> None:
    report = lab.verdict("again", OrtCaptioner(lab.fp16, threads=1), step=1)
    assert report.label == "PASS", report.reasons
    assert report.quantity("flips").value == 0
    assert report.quantity("distribution").value < 1e-6
    assert not report.not_measured


def test_honest_int8_passes(lab: Lab) -> None:
    model = lab.export(lab.quantize("int8"), "int8")
    report = lab.verdict("int8", OrtCaptioner(model, threads=1), step=1)
    assert report.label == "PASS", report.reasons
    assert 0 < report.quantity("distribution").value


def test_twenty_images_decide_nothing_and_say_how_many_would(lab: Lab) -> None:
    report = lab.verdict("few", OrtCaptioner(lab.fp16, threads=1), step=ELEVENTH)
    assert report.images == 20
    assert report.label == "INCONCLUSIVE (smoke test)"
    gate = find_model("demo").gate
    # No flip below the margin, and Tango's closed form without a discordant pair.
    z2, rise = NormalDist().inv_cdf(0.95) ** 2, gate.truncation_rise
    assert report.needed == max(images_for_rate(0, gate.flip_rate), ceil(z2 * (1 - rise) / rise))


def test_left_and_right_swapped_in_the_head(lab: Lab) -> None:
    change = sabotage.swap_sides_in_head(lab.merged)
    reason = failed(lab.verdict("swapped", lab.altered("swapped", change)), "flips")
    assert "(laterality " in reason


def test_one_layers_scales_doubled(lab: Lab) -> None:
    doubled = sabotage.altered(
        lab.quantize("int8"), lab.root / "doubled-weights", sabotage.double_scales
    )
    captioner = OrtCaptioner(lab.export(doubled, "doubled"), threads=1)
    reason = failed(lab.verdict("doubled", captioner), "distribution")
    assert "damaged weights" in reason


def test_int2_weights(lab: Lab) -> None:
    report = lab.verdict("int2", lab.altered("int2", sabotage.two_bits))
    # Rounding this coarse turns facts over; whether it also moves tokens everywhere depends on how
    # sure the model was, and then that is named before.
    assert report.verdict == "FAIL"
    assert report.reason.startswith(("distribution: ", "flips: ")), report.reasons
    assert {report.quantity(n).verdict for n in ("flips", "facts right")} == {"FAIL"}


def test_no_adapter(lab: Lab) -> None:
    plain = lab.root / "plain"
    plain.mkdir()
    merge_adapters(DEMO / "model", [], plain)
    captioner = OrtCaptioner(lab.export(plain, "plain-export"), threads=1)
    reason = failed(lab.verdict("none", captioner), "distribution")
    assert "another model" in reason


def test_the_wrong_adapter(lab: Lab) -> None:
    other = sabotage.other_adapter(DEMO / "adapter", lab.root / "other-adapter")
    merged = lab.root / "other"
    merged.mkdir()
    merge_adapters(DEMO / "model", [other], merged)
    captioner = OrtCaptioner(lab.export(merged, "other-export"), threads=1)
    reason = failed(lab.verdict("other", captioner), "distribution")
    assert "another model" in reason


def test_a_model_that_ignores_the_image(lab: Lab) -> None:
    reason = failed(lab.verdict("blind", lab.altered("blind", sabotage.blind)), "image use")
    assert "no longer depend on the image" in reason


def test_vision_features_of_one_modality_zeroed(lab: Lab) -> None:
    hidden = [open_image(c.image).tobytes() for c in lab.cases if c.modality == "ultrasound"]
    assert len(hidden) > 20

    def is_ultrasound(image: Image) -> bool:
        return image.tobytes() in hidden

    reason = failed(
        lab.verdict("unseen", Unseen(OrtCaptioner(lab.fp16, threads=1), is_ultrasound)),
        "distinct captions",
    )
    assert "captions of ultrasound are the same for different patients" in reason


def test_a_tokenizer_off_by_one(lab: Lab) -> None:
    shifted = sabotage.shift_tokenizer(lab.fp16, lab.root / "shifted")
    reason = failed(lab.verdict("shifted", OrtCaptioner(shifted, threads=1)), "tokenizer")
    assert "become other input tokens" in reason


def test_captions_cut_at_ten_tokens(lab: Lab) -> None:
    report = lab.verdict("cut", Cut(OrtCaptioner(lab.fp16, threads=1), 10))
    assert "captions cut before their end" in failed(report, "truncation")
    assert report.quantity("length").verdict == "FAIL"
    assert report.quantity("distribution").verdict == "PASS"
