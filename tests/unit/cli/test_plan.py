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
from exporter.core.errors import EnvironmentLacks
from exporter.pipeline import build as build_module
from exporter.pipeline import targets as targets_module
from exporter.pipeline.machine import Gpu
from tests.support.tiny import write_tiny_model
from tests.support.tiny_clipseg import write_tiny_clipseg

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
    assert "peak memory: with TensorRT; onnxruntime (CUDA) needs" in text


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


def test_weights_of_a_mask_model_are_planned_at_their_own_resolution(tmp_path, capsys):
    folder = write_tiny_clipseg(tmp_path / "m")
    arguments = ["--weights", str(folder), "--target", "t4", "--json"]
    first = json.loads(said(capsys, "plan", "--model", str(folder), *arguments[2:]))
    assert first["fit"]["parameters"] < 10**6
    # The profile's own sizes differ from the tiny ones: the folder's hold.
    second = json.loads(said(capsys, "plan", "--model", "clipseg-rd64-refined", *arguments))
    assert second["fit"]["parameters"] == first["fit"]["parameters"]
    # transformers 5 saves image settings elsewhere.
    settings = folder / "preprocessor_config.json"
    inside = json.dumps({"image_processor": json.loads(settings.read_text("utf-8"))})
    (folder / "processor_config.json").write_text(inside, encoding="utf-8")
    settings.unlink()
    assert json.loads(said(capsys, "plan", "--model", "clipseg-rd64-refined", *arguments)) == second


def test_a_folder_without_an_image_size_is_told_where_it_belongs(tmp_path, capsys):
    folder = write_tiny_clipseg(tmp_path / "m")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    line = said(capsys, "plan", "--model", "clipseg", "--weights", str(folder), code=3)
    assert "size is not published" in line
    assert "in the folder's config.json or preprocessor_config.json: correct the file" in line
    assert "--model" not in line


def test_a_profile_goes_before_a_folder_of_its_name(tmp_path, capsys, monkeypatch):
    write_tiny_model(tmp_path / "smolvlm")
    monkeypatch.chdir(tmp_path)
    arguments = ["--target", "cpu-avx2", "--json"]
    asked = json.loads(said(capsys, "plan", "--model", "smolvlm", *arguments))["fit"]
    assert (asked["model"], asked["parameters"]) == ("smolvlm-500m", 507482304)
    own = json.loads(said(capsys, "plan", "--model", "./smolvlm", *arguments))["fit"]
    assert own["model"] == "smolvlm"
    assert own["parameters"] < 10**6
    with_weights = ["plan", "--model", "smolvlm", "--weights", "./smolvlm", *arguments]
    both = json.loads(said(capsys, *with_weights))["fit"]
    assert (both["model"], both["parameters"]) == ("smolvlm-500m", own["parameters"])


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
        (["--model", "bio-clinicalbert", "--target", "cpu-avx2", "--batch", "8"], 3, "--batch 8"),
        (["--model", "bio-clinicalbert", "--target", "cpu-avx2", "--context", "99999"], 3, "99999"),
        (["--model", "smolvlm-500m", "--target", "t4", "--context", "100"], 3, "1159 positions"),
        (["--model", SEVEN_B, "--target", "t4", "--max-size", "0.3"], 2, "--weights DIR"),
        (["--model", SEVEN_B, "--target", "t4", "--int4", "--int8"], 2, "exactly one"),
    ],
)
def test_a_plan_that_cannot_be_made(capsys, arguments, code, message):
    assert message in said(capsys, "plan", *arguments, code=code)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bio-clinicalbert", "one text of 512 positions, the model's limits"),
        ("clip-vit-base-patch32", "one image at the image limit (1 tile(s)) and one text of 77"),
        ("t5-small", "one text of 512 positions, a prompt of"),
    ],
)
def test_a_plan_says_what_goes_in(capsys, name, words):
    text = said(capsys, "plan", "--model", name, "--target", "cpu-avx2")
    assert words in text
    assert "vision" not in text.splitlines()[2]
    assert " a caption" not in text
    assert "CPU only" not in text
    on_gpu = said(capsys, "plan", "--model", name, "--target", "l4")
    assert on_gpu.count("CPU only  ") == 4
    assert "recommended: nothing (this kind of model runs on the CPU only" in on_gpu


def test_a_plan_for_a_batch_says_what_is_shown(capsys):
    text = said(capsys, "plan", "--model", "smolvlm-500m", "--target", "l4", "--batch", "8")
    assert "tokens/s of all together, in all: until all 8 end" in text


def test_a_gpu_that_no_profile_knows_is_named(capsys, monkeypatch):
    board = Gpu("NVIDIA Titan Z", 6_000_000_000, "3.5")
    monkeypatch.setattr("exporter.pipeline.targets.find_gpu", lambda: board)
    line = "GPU of this machine: NVIDIA Titan Z, 6.0 GB (by its driver or board); no target profile"
    assert line in said(capsys, "plan", "--model", "demo", "--target", "auto")
    assert line not in said(capsys, "plan", "--model", "demo", "--target", "t4")
    document = json.loads(said(capsys, "plan", "--model", "demo", "--target", "auto", "--json"))
    assert document["fit"]["left_out"].startswith("GPU of this machine: NVIDIA Titan Z")
    assert (
        said(capsys, "targets").splitlines()[-1].startswith("GPU of this machine: NVIDIA Titan Z")
    )


def test_targets_end_with_this_machines_gpu(capsys, monkeypatch):
    known = Gpu("Tesla T4", 16_000_000_000, "7.5")
    monkeypatch.setattr("exporter.pipeline.targets.find_gpu", lambda: known)
    last = said(capsys, "targets").splitlines()[-1]
    assert last.startswith("this machine: cpu-")
    assert last.endswith(", t4")


def test_a_jetson_that_no_profile_knows_is_named(tmp_path, monkeypatch):
    board = tmp_path / "model"
    board.write_text("NVIDIA Jetson Orin Nano 4GB\0")
    monkeypatch.setattr(targets_module, "BOARD", board)
    monkeypatch.setattr(targets_module, "jetson_target", lambda: None)
    monkeypatch.setattr(targets_module, "find_gpu", lambda: None)
    assert "NVIDIA Jetson Orin Nano 4GB (by" in targets_module.unknown_gpu()
    monkeypatch.setattr(targets_module, "jetson_target", lambda: find_target(NANO))
    assert targets_module.unknown_gpu() == ""


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


def test_build_refuses_what_cannot_fit_before_the_download(tmp_path, capsys, monkeypatch):
    def download(*_, **__):
        raise EnvironmentLacks("the weights were asked for")

    monkeypatch.setattr(build_module, "resolve", download)
    arguments = ["build", "--model", "llava-1.5-7b", "--offline", "--out", str(tmp_path / "b")]
    line = said(capsys, *arguments, "--scheme", "fp16", "--target", NANO, code=3)
    assert "does not fit: fp16 needs about" in line
    line = said(capsys, *arguments, "--scheme", "int4-rtn", "--target", "l4", code=5)
    assert "the weights were asked for" in line
    assert not list(tmp_path.iterdir())
