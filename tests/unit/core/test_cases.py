"""An instruction that names the modality of each image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.calibrate.sets import open_set
from exporter.catalog.profiles import find_model, model_profiles
from exporter.compare.jobs import Job, JobCase
from exporter.core.cases import MODALITY, prompt_for
from exporter.core.errors import InputRefused, WrongUsage
from exporter.pipeline import calibrated, evaluation
from exporter.pipeline.evaluation import open_evaluation
from exporter.pipeline.request import BuildRequest

AWARE = "Modality: {modality}. Describe."


def test_the_modality_stands_in_its_place() -> None:
    assert prompt_for(AWARE, "ct") == "Modality: ct. Describe."
    assert prompt_for("Describe {this}.", "ct") == "Describe {this}."
    assert prompt_for("Describe.", "") == "Describe."


@pytest.mark.parametrize("modality", ["", " "])
def test_an_image_without_a_modality_is_refused(modality: str) -> None:
    with pytest.raises(InputRefused, match="none is known; give one"):
        prompt_for(AWARE, modality)


def test_a_measured_process_asks_each_case_for_itself() -> None:
    cases = (JobCase("a", "a.png", "0", "ct"), JobCase("b", "b.png", "0", "mri"))
    job = Job("n", "speed", "ort", "m", "0", 1, AWARE, 8, cases, "f")
    assert [job.asked(case) for case in cases] == [
        AWARE.replace(MODALITY, m) for m in ("ct", "mri")
    ]
    # A result of another modality is another result.
    other = Job("n", "speed", "ort", "m", "0", 1, AWARE, 8, (cases[1], cases[0]), "f")
    assert job.digest != other.digest


def test_a_set_without_modalities_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_evaluation("phantoms-eval", prompt=AWARE, limit=4).prompt == AWARE
    known = open_set("phantoms-eval").cases()[:3]
    unknown = SimpleNamespace(
        prompt="Describe.", cases=lambda: [*known, replace(known[0], modality="")]
    )
    monkeypatch.setattr(evaluation, "open_set", lambda _: unknown)
    monkeypatch.setattr(calibrated, "open_set", lambda _: unknown)
    assert open_evaluation("mine").prompt == "Describe."
    with pytest.raises(InputRefused, match="none is known"):
        open_evaluation("mine", prompt=AWARE)
    with pytest.raises(InputRefused, match="none is known"):
        calibrated.open_calibration("mine", 0, AWARE, None)


def test_what_a_build_asks() -> None:
    profile, plain = find_model("smolvlm-500m"), BuildRequest("m", "int8", Path("o"))
    aware = BuildRequest("m", "int8", Path("o"), modality_aware=True)
    assert plain.instruction(profile) == profile.prompts.default
    assert MODALITY in aware.instruction(profile)
    with pytest.raises(WrongUsage, match="has no such prompt"):
        aware.instruction(find_model("cnn-transformer"))
    both = BuildRequest("m", "int8", Path("o"), prompt="x", modality_aware=True)
    with pytest.raises(WrongUsage, match="--prompt is given too"):
        both.instruction(profile)


def test_the_profiles_instructions_name_the_modality_once() -> None:
    prompts = [find_model(name).prompts.modality_aware for name in model_profiles()]
    assert sum(map(bool, prompts)) >= 8
    assert all(text.count(MODALITY) == 1 for text in prompts if text)
