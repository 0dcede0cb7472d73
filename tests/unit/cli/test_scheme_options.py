"""The options on the form of 4-bit blocks: what they change, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from exporter.cli.main import run

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs `medexport plan` for the demo model: exit code, stdout, stderr."""

    def made(*options: str) -> tuple[int, str, str]:
        code = run(["plan", "--model", "demo", "--offline", *options])
        return code, *capsys.readouterr()

    return made


def test_they_apply_to_the_4_bit_parts_and_are_named(plan: Plan) -> None:
    code, out, err = plan("--scheme", "int4-gptq", "--group-size", "32", "--symmetric", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["scheme"] == "int4-gptq-g32-sym"
    forms = {
        (layer["format"]["bits"], layer["format"]["symmetric"])
        for layer in found["layers"]
        if layer["format"]
    }
    assert forms == {(4, True), (8, True)}
    blocks = {e["format"]["block"] for e in found["layers"] if (e["format"] or {}).get("bits") == 4}
    assert blocks == {32}


def test_the_profile_s_int4_takes_them_too(plan: Plan) -> None:
    code, out, err = plan("--int4", "--group-size", "128")
    assert code == 0, err
    assert "demo as int4-gptq-g128 for" in out


@pytest.mark.parametrize("asked", [("--int8",), ("--scheme", "fp16"), ("--scheme", "bnb-nf4")])
def test_schemes_without_4_bit_blocks_refuse_them(plan: Plan, asked: tuple[str, ...]) -> None:
    code, _, err = plan(*asked, "--symmetric")
    assert code == 2
    assert "has no 4-bit blocks of ours" in err


@pytest.mark.parametrize(
    "options",
    [("--symmetric",), ("--group-size", "32"), ("--int4", "--int8", "--group-size", "32")],
)
def test_they_need_one_scheme(plan: Plan, options: tuple[str, ...]) -> None:
    code, _, err = plan(*options)
    assert code == 2
    assert "exactly one of --int4, --int8 and --scheme" in err


def test_help_says_whose_prompt_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Instruction given with each image; default: the profile's." in text
    assert "model folder (./NAME where a profile has that name)" in text
