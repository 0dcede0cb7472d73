"""A vision part in static 8 bits: what is written, what it computes, and which layers are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.calibrate.imageset import ImageSet
from exporter.core.cases import Case
from exporter.core.modelfiles import read_config
from exporter.core.static8 import CODES
from exporter.families.table import family_of
from exporter.graphs.export import export_model
from exporter.pipeline.calibrated import Calibration
from exporter.pipeline.static8 import quantize_static
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.smooth import Observed, SmoothSettings
from exporter.quantizers.static_layers import input_groups, keep_within
from exporter.runtimes.ort_session import open_session
from tests.support.family_cases import CASES
from tests.support.tiny import write_tiny_model

Array = NDArray[np.float32]
LAYER = "model.vision_model.encoder.layers.1."
FC1, FC2 = f"{LAYER}mlp.fc1", f"{LAYER}mlp.fc2"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("static") / "model", layers=2, seed=5)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder, cases = tmp_path_factory.mktemp("images"), []
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 255, (48, 40 + 8 * i), np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
        cases.append(Case(f"c{i}", folder / f"{i}.png", f"p{i}", "x-ray", "A scan."))
    images = ImageSet("three", "0" * 64, "Describe this image.", ())
    return Calibration(images, tuple(cases), images.prompt)


def made(merged: Path, calibration: Calibration, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The quantized folder and its quantization.json."""
    float16, out = folder / "float16", folder / "out"
    for path in (float16, out):
        path.mkdir()
    export_model(merged, float16)
    scheme = find_scheme("int8-static")
    quantize_static(merged, float16, out, scheme, calibration, folder / "work", threads=1)
    return out, json.loads((out / "quantization.json").read_text())


def features(folder: Path, exported: Path) -> Array:
    """What the exported vision graph of `folder` gives for some tiles."""
    exported.mkdir()
    export_model(folder, exported)
    tower = family_of(read_config(folder / "config.json")).tower_spec(
        read_config(folder / "config.json")
    )
    session = open_session(exported / "model/onnx/vision_encoder.onnx", 1)
    feeds = tower.example_feeds(np.random.default_rng(8))
    return np.concatenate([session.run(None, dict(f))[0].ravel() for f in feeds])


def test_the_features_stay_and_every_layer_says_how_much_it_moved_them(
    merged: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out, document = made(merged, calibration, tmp_path)

    rows = {r["name"]: r for r in document["layers"] if r["method"] == "smoothquant"}
    assert len(rows) == 2 * 6 + 1
    stored = load_file(out / "model.safetensors")
    for name, row in rows.items():
        assert stored[name + CODES].shape == (row["rows"], row["columns"])
        assert (row["code"], row["bits"], row["block"]) == ("static", 8, row["columns"])
        assert 0 < row["feature_error"] <= SmoothSettings().layer_limit
        assert 0 < row["relative_error"] < 0.02
    assert document["settings"]["smoothquant"]["layer_limit"] == SmoothSettings().layer_limit
    record = json.loads((out / "calibration.json").read_text())["vision"]
    assert record["alone"].keys() == rows.keys() and not record["float16"]
    assert 0 < record["features"] <= SmoothSettings().total_limit

    plain = features(merged, tmp_path / "plain")
    static = features(out, tmp_path / "static")
    # Random tiles are not the calibration images, hence more than `features` in the record.
    assert 1e-4 < np.linalg.norm(static - plain) / np.linalg.norm(plain) < 0.06
    import onnx

    graph = onnx.load(tmp_path / "static/model/onnx/vision_encoder.onnx").graph
    assert [n.op_type for n in graph.node].count("MatMulIntegerToFloat") == 13


def test_torch_computes_the_same_from_the_folder(
    merged: Path, calibration: Calibration, tmp_path: Path
) -> None:
    from exporter.runtimes.ort import OrtCaptioner
    from exporter.runtimes.torch_reference import TorchCaptioner

    out, _ = made(merged, calibration, tmp_path)
    (tmp_path / "exported").mkdir()
    export_model(out, tmp_path / "exported", accuracy_level=0)
    image = Image.open(calibration.cases[0].image)
    ours = OrtCaptioner(tmp_path / "exported/model", threads=1).score(image, "Describe.", [5, 6])
    theirs = TorchCaptioner(out, threads=1).score(image, "Describe.", [5, 6])
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_other_kinds_of_vision_part(kind: str, calibration: Calibration, tmp_path: Path) -> None:
    write = next(case.write for case in CASES if case.name == kind)
    source = tmp_path / "source"
    source.mkdir()
    merge_adapters(write(tmp_path / "published"), [], source)
    out, document = made(source, calibration, tmp_path)
    rows = [r for r in document["layers"] if r["method"] == "smoothquant"]
    left = [f for f in document["floats"] if "features by" in f["reason"]]
    tower = family_of(read_config(source / "config.json")).tower_spec(
        read_config(source / "config.json")
    )
    assert len(rows) + len(left) == sum(t.role == "vision" for t in tower.tensors())
    assert len(rows) > len(left)
    smoothed = sum(r["alpha"] > 0 for r in rows)
    assert smoothed > 0 if kind == "llava" else smoothed == 0  # Qwen's blocks have other names
    plain, static = features(source, tmp_path / "plain"), features(out, tmp_path / "static")
    assert np.linalg.norm(static - plain) / np.linalg.norm(plain) < 0.1


def test_a_layer_that_8_bits_would_ruin_stays_in_float16_with_the_figure(
    merged: Path, calibration: Calibration, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in merged.iterdir():
        if file.is_file():
            (bad / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    # One channel far above all others, which nothing downstream reads: its range is all that counts.
    bias, weight = tensors[FC1 + ".bias"].copy(), tensors[FC2 + ".weight"].copy()
    bias[3], weight[:, 3] = 3000, 0
    tensors |= {FC1 + ".bias": bias, FC2 + ".weight": weight}
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})

    out, document = made(bad, calibration, tmp_path)

    floats = {f["name"]: f["reason"] for f in document["floats"]}
    assert "it alone moves the features by" in floats[FC2 + ".weight"]
    stored = load_file(out / "model.safetensors")
    assert np.array_equal(stored[FC2 + ".weight"], weight)
    assert sum(r["method"] == "smoothquant" for r in document["layers"]) == 12
    plain, static = features(bad, tmp_path / "plain"), features(out, tmp_path / "static")
    assert np.linalg.norm(static - plain) / np.linalg.norm(plain) < 0.06


def test_the_worst_go_until_all_together_hold() -> None:
    settings = SmoothSettings(layer_limit=0.1, total_limit=0.05)
    alone = {"a": 0.01, "b": 0.2, "c": 0.04, "d": 0.03}
    asked: list[list[str]] = []

    def total(names: Sequence[str]) -> float:
        asked.append(sorted(names))
        return float(np.sqrt(sum(alone[n] ** 2 for n in names)))

    verdict = keep_within(alone, total, settings)

    assert asked == [["a", "c", "d"], ["a", "d"]]
    assert verdict.left.keys() == {"b", "c"}
    assert "0.2000 of their norm, more than 0.1" in verdict.left["b"]
    assert "the worst (0.0400)" in verdict.left["c"] and "0.0510" in verdict.left["c"]
    assert verdict.total == pytest.approx(np.sqrt(0.001))
    assert keep_within({"a": 1.0}, total, settings).total == 0


def test_matrices_that_read_the_same_are_one_group(merged: Path) -> None:
    config = read_config(merged / "config.json")
    tower = family_of(config).tower_spec(config)
    at = "model.vision_model.encoder.layers.0."

    def seen(seed: int) -> Observed:
        values = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
        return Observed(values[0], values[1], values)

    names = [f"{at}self_attn.{n}_proj.weight" for n in "qkv"] + [f"{at}mlp.fc1.weight"]
    inputs = {name: seen(0) for name in names[:3]} | {names[3]: seen(1), "x": seen(2), "y": seen(2)}
    groups = input_groups(inputs, tower)
    assert [(g.names, g.norm) for g in groups] == [
        (tuple(names[:3]), f"{at}layer_norm1"),
        ((names[3],), f"{at}layer_norm2"),
        (("x", "y"), ""),
    ]
