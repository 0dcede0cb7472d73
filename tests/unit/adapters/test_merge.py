"""Merging small synthetic checkpoints: memory, refusals, what the folder and the proof say."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.core import artifact
from exporter.core.digest import sha256_file
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.core.tensors import Checkpoint
from tests.unit.adapters.synthetic import (
    EMBEDDING,
    Q,
    base_arrays,
    lora_arrays,
    write_base,
    write_lora,
)

P = "base_model.model."


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_merge_and_record(tmp_path: Path, out: Path) -> None:
    base, lora = write_base(tmp_path / "base"), write_lora(tmp_path / "lora")
    seen: list[tuple[int, int]] = []
    proof = merge_adapters(
        base, [lora], out, progress=lambda done, total, what="": seen.append((done, total))
    )
    start, low, found = base_arrays(), lora_arrays(), load_file(out / "model.safetensors")
    for layer in (0, 1):
        name = Q.format(layer)
        a, b = (low[f"{P}{name}.lora_{x}.weight"] for x in "AB")
        expected = start[f"{name}.weight"] + 2 * (b @ a)
        assert np.allclose(found[f"{name}.weight"], expected, rtol=1e-3, atol=1e-3)
        record = proof.targets[layer]
        delta = np.linalg.norm(2 * (b @ a)) / np.linalg.norm(start[f"{name}.weight"])
        assert record.relative_delta == pytest.approx(delta, rel=1e-5)
        assert (record.tensor, record.rank, record.scaling) == (f"{name}.weight", 2, 2.0)
    assert np.array_equal(found[EMBEDDING], start[EMBEDDING].astype(np.float16))
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    written = json.loads((out / "merge.json").read_text())
    assert written == json.loads(json.dumps(proof.to_json()))
    assert written["adapters"][0]["weights_sha256"] == sha256_file(
        lora / "adapter_model.safetensors"
    )
    assert written["stored_as"] == {"F32": 5}
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "merge.json",
        "model.safetensors",
    ]


def test_values_beyond_float16_are_refused_by_name(tmp_path: Path, out: Path) -> None:
    big = base_arrays()
    big["model.text_model.norm.weight"][3] = 70000
    with pytest.raises(
        InputRefused, match=r"'model\.text_model\.norm\.weight' has 1 values beyond 65504"
    ):
        merge_adapters(write_base(tmp_path / "base", big), [], out)
    lora = {k: v * 1e3 for k, v in lora_arrays().items()}
    with pytest.raises(InputRefused, match=r"q_proj\.weight' has \d+ values beyond"):
        merge_adapters(write_base(tmp_path / "b"), [write_lora(tmp_path / "l", lora)], out)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_with_nan_is_refused(tmp_path: Path, out: Path, value: float) -> None:
    lora = lora_arrays()
    lora[f"{P}{Q.format(1)}.lora_B.weight"][0, 0] = value
    with pytest.raises(InputRefused, match=r"layers\.1\.self_attn\.q_proj\.lora_B"):
        merge_adapters(write_base(tmp_path / "b"), [write_lora(tmp_path / "l", lora)], out)


def test_one_dead_target_is_enough_to_refuse(tmp_path: Path, out: Path) -> None:
    lora = lora_arrays()
    lora[f"{P}{Q.format(1)}.lora_B.weight"][:] = 0
    with pytest.raises(InputRefused, match=r"changes nothing in '.*layers\.1.*'"):
        merge_adapters(write_base(tmp_path / "b"), [write_lora(tmp_path / "l", lora)], out)


def test_a_saved_module_equal_to_the_base_changes_nothing(tmp_path: Path, out: Path) -> None:
    lora = {f"{P}lm_head.weight": base_arrays()["lm_head.weight"]}
    folder = write_lora(tmp_path / "l", lora, target_modules=None, modules_to_save=["lm_head"])
    with pytest.raises(InputRefused, match="adapter changes nothing"):
        merge_adapters(write_base(tmp_path / "b"), [folder], out)


def test_the_adapters_copy_of_the_base_tells_another_base(tmp_path: Path, out: Path) -> None:
    base = write_base(tmp_path / "base")
    copy = base_arrays()["lm_head.weight"]
    random = np.random.default_rng(3)
    pair = {
        f"{P}lm_head.lora_A.weight": random.normal(size=(2, 8)).astype(np.float32),
        f"{P}lm_head.lora_B.weight": random.normal(size=(12, 2)).astype(np.float32),
    }
    key = f"{P}lm_head.base_layer.weight"
    same = write_lora(
        tmp_path / "1", {**pair, key: copy.astype(np.float16)}, target_modules=["lm_head"]
    )
    assert merge_adapters(base, [same], out).replaced == ()
    other = write_lora(tmp_path / "2", {**pair, key: copy + 0.01}, target_modules=["lm_head"])
    with pytest.raises(InputRefused, match="expected the base that the adapter was trained on"):
        merge_adapters(base, [other], out)


def test_untying_writes_both_tensors_and_says_so(tmp_path: Path, out: Path) -> None:
    arrays = base_arrays()
    head = arrays.pop("lm_head.weight")
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    base = write_base(tmp_path / "base", arrays, config)
    lora = write_lora(
        tmp_path / "l",
        {f"{P}lm_head.weight": head},
        target_modules=None,
        modules_to_save=["lm_head"],
    )
    assert merge_adapters(base, [lora], out).head == "untied"
    found = load_file(out / "model.safetensors")
    assert np.array_equal(found["lm_head.weight"], head.astype(np.float16))
    assert np.array_equal(found[EMBEDDING], arrays[EMBEDDING].astype(np.float16))
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["text_config"]["tie_word_embeddings"] is False


def test_integers_bfloat16_and_dtype_keys(tmp_path: Path, out: Path) -> None:
    base = write_base(
        tmp_path / "base",
        {**base_arrays(), "model.vision_model.position_ids": np.arange(5)},
        {"torch_dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}},
    )
    merge_adapters(base, [], out)
    stored = Checkpoint.open(out)
    assert stored.info("model.vision_model.position_ids").dtype == "I64"
    assert np.array_equal(stored.raw("model.vision_model.position_ids"), np.arange(5))
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == written["vision_config"]["torch_dtype"] == "float16"
    assert "dtype" not in written


def test_a_full_disk_is_seen_before_writing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(EnvironmentLacks, match="disk space"):
        merge_adapters(write_base(tmp_path / "base"), [], out)
    assert list(out.iterdir()) == []


def test_memory_depends_on_the_largest_tensor_not_on_the_model(tmp_path: Path, out: Path) -> None:
    width, layers = 512, 24
    arrays = base_arrays(layers, width)
    random = np.random.default_rng(5)
    base = write_base(tmp_path / "base", arrays)
    lora = {
        f"{P}{Q.format(i)}.lora_{x}.weight": random.normal(size=shape).astype(np.float32)
        for i in range(layers)
        for x, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    folder = write_lora(tmp_path / "l", lora)
    tracemalloc.start()
    merge_adapters(base, [folder], out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * width * width
    # Weight, a copy and a step in float64 of one chunk (here the whole), float16 before and after.
    assert peak < 7 * largest < 0.3 * layers * largest


def test_two_adapters_of_one_name_are_told_apart(tmp_path: Path, out: Path) -> None:
    base = write_base(tmp_path / "base")
    first = write_lora(tmp_path / "1" / "adapter")
    second = write_lora(tmp_path / "2" / "adapter", {k: 0.5 * v for k, v in lora_arrays().items()})
    proof = merge_adapters(base, [first, second], out)
    assert [r.adapter for r in proof.targets] == [0, 1, 0, 1]
    assert [a.name for a in proof.adapters] == ["adapter", "adapter"]


def test_a_hostile_header_is_refused(tmp_path: Path, out: Path) -> None:
    base = write_base(tmp_path / "base")
    save_file({"x": np.zeros(3, np.float32)}, base / "model.safetensors")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (base / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputRefused, match="header"):
        merge_adapters(base, [], out)
