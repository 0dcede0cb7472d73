"""The settings that go into cache keys and manifests are those that the methods work with."""

from __future__ import annotations

import json

import pytest

from exporter.quantizers.awq import EXPONENTS
from exporter.quantizers.gptq import GptqSettings
from exporter.quantizers.schemes import BNB, SCHEMES, find_scheme
from exporter.quantizers.settings import method_settings


@pytest.mark.parametrize("name", SCHEMES)
def test_every_method_of_a_scheme_has_its_settings(name: str) -> None:
    scheme = find_scheme(name)
    settings = method_settings(scheme)
    assert json.loads(json.dumps(settings)).keys() == settings.keys()
    named = set(scheme.method.split("+")) - {"none", "rtn", *BNB}
    assert named <= settings.keys()
    clipped = scheme.calibrated and scheme.method != "smoothquant"
    assert settings.keys() - named == ({"rtn-mse"} if clipped else set())


def test_gptq_and_awq_say_what_decides_their_result() -> None:
    settings = method_settings(find_scheme("int4-awq-gptq"))
    default = GptqSettings()
    assert settings["gptq"] == {
        "damping": default.damping,
        "columns": default.columns,
        "order": default.order,
        "clip": default.clip,
        "sweeps": default.sweeps,
    }
    assert settings["awq"]["exponents"] == list(EXPONENTS)
