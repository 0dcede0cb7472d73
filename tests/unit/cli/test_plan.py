"""`plan`, `targets`, `models` and the refusals of `build`, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from exporter.catalog.profiles import find_target, target_profiles
from exporter.catalog.schema import Memory, Quantity
from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.pipeline import build as build_module
from tests.support.tiny import write_tiny_model

SEVEN_B, NANO = "llava-v1.6-mistral-7b", "jetson-orin-nano-8gb"


def said(capsys, *arguments: str, code: int = 0) -> str:
    """Output of one command line: stdout when it went well, the one line of the error otherwise."""
    assert run([*arguments]) == code
    out, err = capsys.readouterr()
    if code:
        assert err.count("\n") == 1
    return err if code else out


def test_a_plan_for_a_model_without_weights(capsys):
    text = said(capsys, "plan", "--model", SEVEN_B, "--target", NANO)
    assert text.startswith("LLaVA v1.6 Mistral-7B: 7.57 billion parameters")
    assert "does not fit" in text
    assert "5.2 GB for a model, after the system and a desktop took theirs" in text
    assert "without a desktop 6.0 GB are free" in text
    assert "a prompt of 2960 positions" in text


def test_the_plan_as_json_has_the_sum(capsys):
    text = said(capsys, "plan", "--model", SEVEN_B, "--target", "l4", "--int4", "--json")
    fit = json.loads(text)["fit"]
    assert fit["parameters"] == 7566747648
    (target,) = fit["targets"]
    for row in target["schemes"]:
        assert row["needed"] == sum(item["bytes"] for item in row["memory"])
        assert row["limit"]["tokens_per_s"] > row["likely"]["tokens_per_s"]
    assert target["recommended"]["scheme"] in {row["scheme"] for row in target["schemes"]}


def test_the_asked_scheme_is_explained(capsys):
    text = said(capsys, "plan", "--model", "qwen2-vl-2b", "--target", "t4", "--scheme", "int4-hqq")
    assert "memory of int4-hqq" in text
    assert "key-value cache" in text


def test_with_weights_at_hand_every_tensor_is_planned(capsys):
    text = said(capsys, "plan", "--model", "demo", "--scheme", "int8", "--target", "cpu-avx2")
    assert "stored as" in text
    assert "demo as int8 for cpu-avx2" in text


def test_a_folder_is_planned_from_its_own_config(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "m")
    document = json.loads(
        said(capsys, "plan", "--model", str(folder), "--int8", "--target", "cpu-avx2", "--json")
    )
    fit = document["fit"]["targets"][0]["schemes"]
    planned = next(row for row in fit if row["scheme"] == "int8")
    assert planned["weight_bytes"] == document["weight_bytes"]


def test_context_and_batch_grow_the_cache(capsys):
    def cache(*options: str) -> int:
        arguments = ["plan", "--model", "qwen2-vl-2b", "--target", "t4", "--json", *options]
        first = json.loads(said(capsys, *arguments))["fit"]["targets"][0]["schemes"][0]
        return next(i["bytes"] for i in first["memory"] if i["name"] == "key-value cache")

    assert cache("--context", "4096") == 2 * 28 * 2 * 128 * 4096 * 2
    assert cache("--context", "4096", "--batch", "3") == 3 * cache("--context", "4096")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", SEVEN_B, "--target", "t5"], 2, "no target 't5'"),
        (["--model", "moondream2", "--target", "t4", "--context", "9999"], 3, "2048 positions"),
        (["--model", SEVEN_B, "--target", "t4", "--max-size", "0.3"], 2, "--weights DIR"),
        (["--model", SEVEN_B, "--target", "t4", "--int4", "--int8"], 2, "exactly one"),
    ],
)
def test_a_plan_that_cannot_be_made(capsys, arguments, code, message):
    assert message in said(capsys, "plan", *arguments, code=code)


def test_the_heavy_libraries_stay_out_of_a_plan():
    code = (
        "import sys; from exporter.cli.main import run;"
        f"run(['plan', '--model', '{SEVEN_B}', '--target', '{NANO}']);"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_targets_lists_all_with_sources(capsys):
    text = said(capsys, "targets")
    assert all(name in text for name in target_profiles())
    assert "this machine: cpu-" in text
    rows = {row["name"]: row for row in json.loads(said(capsys, "targets", "--json"))}
    assert rows["t4"]["bandwidth_gbs"]["source"].startswith("https://")


def test_models_says_what_builds(capsys):
    rows = json.loads(said(capsys, "models", "--json"))
    assert {row["builds"] for row in rows} == {"yes"}


def test_build_refuses_what_only_can_be_planned(tmp_path, capsys):
    known = (data_root("profiles") / "models" / "t5-small.yaml").read_text(encoding="utf-8")
    assert "status:" not in known
    planned = tmp_path / "planned.yaml"
    planned.write_text(
        known.replace("name: t5-small", "name: planned") + "status: plan-only\n", "utf-8"
    )
    arguments = ["build", "--model", str(planned), "--int4", "--out", str(tmp_path / "b")]
    assert "planned but not built yet" in said(capsys, *arguments, code=2)
    assert list(tmp_path.iterdir()) == [planned]


@pytest.mark.parametrize(("name", "code"), [("small", 3), ("auto", 5)])
def test_build_refuses_what_cannot_fit_before_it_starts(tmp_path, capsys, monkeypatch, name, code):
    import msgspec

    memory = Memory(total_gb=Quantity(0.05, "a test's own", "assumed"))
    small = msgspec.structs.replace(find_target("cpu-avx2"), name="small", memory=memory)
    monkeypatch.setattr(build_module, "choose_target", lambda _: small)
    arguments = ["build", "--model", "demo", "--int8", "--target", name, "--no-compare"]
    line = said(capsys, *arguments, "--out", str(tmp_path / "b"), code=code)
    assert "int8 needs about 0.09 GB on small, which has 0.05 GB for it" in line
    assert not list(tmp_path.iterdir())
