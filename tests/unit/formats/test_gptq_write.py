"""Our folder as GPTQ: values by the reference's formula, settings, rules, and back again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused, WrongUsage
from exporter.formats.gptq_read import read_gptq
from exporter.formats.gptq_write import GptqOptions, write_gptq
from exporter.formats.settings import dynamic_rules
from exporter.runtimes.weights import float_tensors
from tests.unit.formats import reference

ASYMMETRIC, COARSE = BlockFormat(4, 64, False), BlockFormat(8, 64, True)


@pytest.mark.parametrize("only_decoder", [False, True])
def test_every_module_means_what_ours_means(quantized: Path, out: Path, only_decoder: bool) -> None:
    written = write_gptq(quantized, out, GptqOptions(version=2, only_decoder=only_decoder))
    tensors, ours = load_file(out / "model.safetensors"), dict(float_tensors(quantized))
    layers = {
        e["name"]: e for e in json.loads((quantized / "quantization.json").read_text())["layers"]
    }
    assert {f"{m}.weight" for m in written.quantized} | written.dequantized.keys() == layers.keys()
    for module in written.quantized:
        part = {p: tensors.pop(f"{module}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
        meant = reference.gptq_weights(part, layers[f"{module}.weight"]["bits"], 2)
        assert np.array_equal(meant.numpy(), ours.pop(f"{module}.weight")), module
    assert tensors.keys() == ours.keys()
    for name, values in ours.items():
        assert np.array_equal(tensors[name].float().numpy(), values.astype(np.float16)), name
    vision = [m for m in written.quantized if "text_model" not in m]
    assert bool(vision) is not only_decoder


def test_it_comes_back_unchanged(quantized: Path, out: Path, tmp_path: Path) -> None:
    write_gptq(quantized, out, GptqOptions(version=2))
    (tmp_path / "back").mkdir()
    read_gptq(out, tmp_path / "back")
    one, other = (load_file(f / "model.safetensors") for f in (quantized, tmp_path / "back"))
    shared = {n for n in one if n in other}
    assert all(np.array_equal(one[n].numpy(), other[n].numpy()) for n in shared)
    assert {n.rsplit(".", 1)[0] for n in one.keys() - shared} == {
        f["name"]
        for f in _layers(quantized)
        if f["name"] not in {e["name"] for e in _layers(tmp_path / "back")}
    }


def test_the_settings_say_what_is_stored(quantized: Path, out: Path) -> None:
    written = write_gptq(quantized, out, GptqOptions(version=2))
    settings = json.loads((out / "quantize_config.json").read_text())
    assert settings == json.loads((out / "config.json").read_text())["quantization_config"]
    keys = "bits group_size desc_act sym static_groups true_sequential damp_percent"
    assert [settings[k] for k in keys.split()] == [4, 64, False, False, False, False, 0.01]
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq_v2")
    layers = {e["name"]: e for e in _layers(quantized)}
    for module in written.quantized:
        layer = layers[f"{module}.weight"]
        stored = (layer["bits"], layer["block"], layer["symmetric"])
        assert applied(settings, module) == stored, module
    for name in written.dequantized:
        if "embed" not in name:
            assert applied(settings, name.removesuffix(".weight")) is None


def test_version_1_of_a_symmetric_model(tiny: Path, out: Path, tmp_path: Path) -> None:
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme

    folder = tmp_path / "int8"
    folder.mkdir()
    quantize_model(tiny, folder, find_scheme("int8"), threads=1)
    written = write_gptq(folder, out, GptqOptions(version=1))
    tensors, ours = load_file(out / "model.safetensors"), dict(float_tensors(folder))
    module = written.quantized[0]
    assert set(tensors[f"{module}.qzeros"].view(-1).numpy().view(np.uint8)) == {127}
    part = {p: tensors[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
    assert np.array_equal(reference.gptq_weights(part, 8, 1).numpy(), ours[f"{module}.weight"])
    assert json.loads((out / "quantize_config.json").read_text())["checkpoint_format"] == "gptq"
    (tmp_path / "back").mkdir()
    assert read_gptq(out, tmp_path / "back").scheme == "gptq-v1"


def test_rules_are_made_for_the_largest_subtree() -> None:
    formats = {
        "m.text.layers.0.q": ASYMMETRIC,
        "m.text.layers.0.k": ASYMMETRIC,
        "m.text.layers.1.q": COARSE,
        "m.text.layers.1.k": ASYMMETRIC,
        "m.vision.0.fc1": COARSE,
        "m.vision.0.fc2": COARSE,
        "m.connector.proj": None,
        "head": COARSE,
    }
    rules = dynamic_rules(formats, ASYMMETRIC)
    eight = {"bits": 8, "group_size": 64, "sym": True, "desc_act": False}
    assert rules == {
        r"+:^head$": eight,
        r"-:^m\.connector\.": {},
        r"+:^m\.text\.layers\.1\.q$": eight,
        r"+:^m\.vision\.": eight,
    }
    assert dynamic_rules({"a.b": ASYMMETRIC, "a.c": ASYMMETRIC}, ASYMMETRIC) == {}


def test_what_gptq_cannot_hold_is_refused(
    tiny: Path, quantized: Path, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=r"no quantization.json"):
        write_gptq(tiny, out, GptqOptions())
    with pytest.raises(WrongUsage, match="version 3; expected 1 or 2"):
        write_gptq(quantized, out, GptqOptions(version=3))
    for change, message in (
        ({"code": "nf4"}, "stored as nf4; GPTQ holds evenly spaced integers"),
        ({"bits": 3}, "GPTQ takes 4 and 8 bits"),
    ):
        folder = tmp_path / message[:9].strip()
        folder.mkdir()
        for file in quantized.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        report = json.loads((folder / "quantization.json").read_text())
        report["layers"][0] |= change
        (folder / "quantization.json").write_text(json.dumps(report))
        with pytest.raises(InputRefused, match=message):
            write_gptq(folder, out, GptqOptions())


def applied(settings: dict, module: str) -> tuple[int, int, bool] | None:
    """As GPTQModel and vLLM apply `dynamic`: the first pattern that matches decides."""
    for pattern, values in settings["dynamic"].items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                return None
            return tuple(values.get(k, settings[k]) for k in ("bits", "group_size", "sym"))
    return settings["bits"], settings["group_size"], settings["sym"]


def _layers(folder: Path) -> list[dict]:
    return json.loads((folder / "quantization.json").read_text())["layers"]
