"""GPTQ checkpoints written by the reference come in value for value."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.core.errors import InputRefused
from exporter.formats.gptq_read import read_gptq
from exporter.runtimes.torch_reference import load_model
from exporter.runtimes.weights import float_tensors
from tests.unit.formats import reference


@pytest.mark.parametrize(
    ("version", "bits", "group", "symmetric"),
    [(1, 4, 32, True), (2, 4, 32, False), (1, 8, 16, False), (2, 8, 64, True), (2, 4, -1, False)],
)
def test_weights_are_those_that_are_meant(
    tiny: Path, out: Path, tmp_path: Path, version: int, bits: int, group: int, symmetric: bool
) -> None:
    label = "gptq" if version == 1 else "gptq_v2"
    meant = reference.write_gptq_checkpoint(
        tiny,
        tmp_path / "in",
        version=version,
        label=label,
        bits=bits,
        group=group,
        symmetric=symmetric,
    )
    found = read_gptq(tmp_path / "in", out)
    assert all("do not tell" in note for note in found.notes)
    assert not found.notes or (bits == 8 and not symmetric)
    report = json.loads((out / "quantization.json").read_text())
    assert {e["name"] for e in report["layers"]} == set(meant)
    assert {(e["bits"], e["symmetric"], e["relative_error"]) for e in report["layers"]} == {
        (bits, symmetric, None)
    }
    check_weights(out, tiny, meant, exact=True)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_scattered_groups_become_float_and_are_noted(tiny: Path, out: Path, tmp_path: Path) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in", order=True)
    found = read_gptq(tmp_path / "in", out)
    assert f"{len(meant)} of {len(meant)} matrices" in found.notes[0]
    report = json.loads((out / "quantization.json").read_text())
    assert report["layers"] == []
    reasons = {f["name"]: f["reason"] for f in report["floats"]}
    assert all("desc_act" in reasons[name] for name in meant)
    check_weights(out, tiny, meant, exact=False)


def test_the_folder_loads_in_torch_and_in_the_graphs(tiny: Path, out: Path, tmp_path: Path) -> None:
    from exporter.graphs.export import export_model

    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in")
    read_gptq(tmp_path / "in", out)
    model = load_model(out, json.loads((out / "config.json").read_text()))
    loaded = dict(model.named_parameters())
    for name, weight in meant.items():
        assert torch.equal(loaded[name], weight)
    (tmp_path / "exported").mkdir()
    report = export_model(out, tmp_path / "exported")
    assert {report.bits[name] for name in meant} == {4}


def test_zero_biases_of_writers_are_left_out(tiny: Path, out: Path, tmp_path: Path) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in")
    name = min(meant).removesuffix(".weight")
    add(tmp_path / "in", {f"{name}.bias": torch.zeros(64, dtype=torch.float16)})
    found = read_gptq(tmp_path / "in", out)
    assert "1 biases of zeros were left out" in found.notes[0]
    assert f"{name}.bias" not in dict(float_tensors(out))


def test_overrides_by_module(tiny: Path, out: Path, tmp_path: Path) -> None:
    """A checkpoint at 4 bits whose down_proj are 8 bits, by GPTQModel's dynamic."""
    low = reference.write_gptq_checkpoint(tiny, tmp_path / "low", bits=4)
    high = reference.write_gptq_checkpoint(tiny, tmp_path / "high", bits=8)
    swap = {k: v for k, v in load_file(tmp_path / "high/model.safetensors").items() if "down" in k}
    add(tmp_path / "low", swap)
    change_settings(tmp_path / "low", dynamic={r".*\.down_proj.*": {"bits": 8}})
    read_gptq(tmp_path / "low", out)
    check_weights(out, tiny, {n: (high if "down" in n else low)[n] for n in low}, exact=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits is 3; medexport reads 4 and 8"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 64}, "groups; [0-9]+ inputs in groups of 64 make"),
        ({"quant_method": "exl2"}, "quant_method 'exl2'; expected gptq or awq"),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, "a awq checkpoint; expected gptq"),
        ({"checkpoint_format": "marlin"}, "packing 'marlin'"),
        ({"dynamic": {"-:.*q_proj": {}}}, "is quantized, but dynamic excludes it"),
        ({"dynamic": {"(a+)+$": {"bits": 8}}}, "may take for ever"),
        ({"dynamic": {"[": {}}}, "dynamic pattern '\\['"),
        ({"dynamic": {".*": {"bits": 2}}}, "bits is 2"),
        ({"dynamic": ["x"]}, "dynamic is a list"),
        ({"bits": 8}, "g_idx' has shape|groups"),
    ],
)
def test_hostile_settings(
    tiny: Path, out: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    reference.write_gptq_checkpoint(tiny, tmp_path / "in", settings=settings)
    with pytest.raises(InputRefused, match=message):
        read_gptq(tmp_path / "in", out)


def test_two_settings_that_disagree(tiny: Path, out: Path, tmp_path: Path) -> None:
    reference.write_gptq_checkpoint(tiny, tmp_path / "in")
    path = tmp_path / "in/quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sym": True}))
    with pytest.raises(InputRefused, match="disagree on symmetric"):
        read_gptq(tmp_path / "in", out)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda t: t + 7, "holds groups 7 to"),
        ("g_idx", lambda t: t[:-1], "g_idx' has shape"),
        ("g_idx", lambda t: t.long(), "is I64; expected I32"),
        ("qzeros", lambda t: t[:, :-1].contiguous(), "qzeros' has shape"),
        ("qweight", lambda t: t.flatten(), "expected two axes"),
        ("scales", lambda t: t * float("inf"), "NaN or infinity"),
        ("scales", lambda t: t[:1].contiguous(), "1 groups; 64 inputs in groups of 32 make 2"),
    ],
)
def test_hostile_parts(tiny: Path, out: Path, tmp_path: Path, part, change, message: str) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in")
    name = next(n for n in meant if "q_proj" in n).removesuffix("weight") + part
    add(tmp_path / "in", {name: change(load_file(tmp_path / "in/model.safetensors")[name])})
    with pytest.raises(InputRefused, match=message):
        read_gptq(tmp_path / "in", out)


def test_a_missing_g_idx_with_desc_act(tiny: Path, out: Path, tmp_path: Path) -> None:
    reference.write_gptq_checkpoint(tiny, tmp_path / "in", order=True)
    path = tmp_path / "in/model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("g_idx")}, path)
    with pytest.raises(InputRefused, match="is missing, and desc_act needs it"):
        read_gptq(tmp_path / "in", out)


def test_a_missing_g_idx_without_desc_act(tiny: Path, out: Path, tmp_path: Path) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("g_idx")}, path)
    read_gptq(tmp_path / "in", out)
    check_weights(out, tiny, meant, exact=True)


def test_a_zero_field_of_ones_in_version_1_needs_a_known_writer(
    tiny: Path, out: Path, tmp_path: Path
) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in", version=1, label="gptq")
    name = min(meant).removesuffix("weight") + "qzeros"
    zeros = load_file(tmp_path / "in/model.safetensors")[name]
    # As GPTQModel does: zero point 0 less one borrows from the neighbour in the word.
    lowered = ((zeros[0, 0].long() & 0xFFFFFFFF) + 0x11111111) & 0xFFFFFFF0
    zeros[0, 0] = reference.signed(torch.tensor([lowered - 0x11111111]))[0]
    add(tmp_path / "in", {name: zeros})
    with pytest.raises(InputRefused, match="zero fields are 15, which in version 1 loaders read"):
        read_gptq(tmp_path / "in", out)
    change_settings(tmp_path / "in", meta={"quantizer": ["gptqmodel:7.7.0"]})
    other = tmp_path / "other"
    other.mkdir()
    read_gptq(tmp_path / "in", other)
    weights = dict(float_tensors(other))
    codes = reference.unpack_rows(
        load_file(tmp_path / "in/model.safetensors")[name.replace("qzeros", "qweight")], 4
    )
    scale = load_file(tmp_path / "in/model.safetensors")[name.replace("qzeros", "scales")].float()
    first = (codes[:32, 0].float() * scale[0, 0]).numpy()
    assert np.array_equal(weights[min(meant)][0, :32], first)


def check_weights(folder: Path, tiny: Path, meant: dict[str, torch.Tensor], *, exact: bool) -> None:
    found = dict(float_tensors(folder))
    original = load_file(tiny / "model.safetensors")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        expected = meant.get(name, tensor).float()
        if name in meant and not exact:
            expected = expected.half().float()
        assert np.array_equal(found[name], expected.numpy()), name


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


def change_settings(folder: Path, **values: object) -> None:
    path = folder / "quantize_config.json"
    settings = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
