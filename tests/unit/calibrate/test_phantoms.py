"""Phantoms: reproducible, balanced, split by patient, and captions that say what was drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.phantoms.samples import MODALITIES, Phantom, draw_phantoms
from exporter.calibrate.phantoms.scene import SIZES_MM
from exporter.calibrate.sets import open_set
from exporter.core.data import data_root

SETS = ("phantoms-calib", "phantoms-eval")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return list(draw_phantoms("test", 40, 4))


def test_drawing_is_deterministic(phantoms: list[Phantom]) -> None:
    again = list(draw_phantoms("test", 2, 4, first=3))
    for phantom, same in zip(phantoms[12:20], again, strict=True):
        assert phantom.id == same.id
        assert phantom.caption == same.caption
        assert np.array_equal(phantom.pixels, same.pixels)


def test_patients_differ_and_splits_are_disjoint(phantoms: list[Phantom]) -> None:
    other = list(draw_phantoms("other", 40, 4))
    assert not {p.patient for p in phantoms} & {p.patient for p in other}
    images = {p.pixels.tobytes() for p in (*phantoms, *other)}
    assert len(images) == len(phantoms) + len(other)


def test_modalities_are_balanced_and_sizes_vary(phantoms: list[Phantom]) -> None:
    assert Counter(p.scene.region.modality for p in phantoms) == dict.fromkeys(MODALITIES, 40)
    shapes = {p.pixels.shape for p in phantoms}
    assert len(shapes) >= 12
    assert any(h > 1.5 * w for h, w in shapes)
    assert any(w > 1.5 * h for h, w in shapes)


def test_modalities_look_different(phantoms: list[Phantom]) -> None:
    """A classifier of eight numbers (mean and spread of the quadrants) beats chance by far."""

    def features(pixels: np.ndarray) -> np.ndarray:
        h, w = pixels.shape
        parts = [pixels[i * h // 2 : (i + 1) * h // 2, j * w // 2 : (j + 1) * w // 2] for i in (0, 1) for j in (0, 1)]  # fmt: skip
        return np.array([f(p) for p in parts for f in (np.mean, np.std)] + [h / w * 100])

    x = np.array([features(p.pixels) for p in phantoms])
    y = np.array([p.scene.region.anatomy for p in phantoms])
    near = ((x[:, None] - x[None]) ** 2).sum(-1) + np.eye(len(x)) * 1e12
    assert (y[near.argmin(1)] == y).mean() > 0.8


def test_captions_say_the_facts(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        caption, plain = phantom.caption.lower(), phantom.plain
        for fact in phantom.facts:
            value = fact["value"]
            if fact["type"] not in ("modality", "laterality"):
                assert value in caption, (value, caption)
            if fact["type"] == "laterality":
                mirrored = {"left": "right", "right": "left"}[value]
                assert value in caption
                assert f"picture's {mirrored}" in phantom.keywords
                assert mirrored in plain.lower()
            if fact["type"] == "measurement":
                assert f"{int(value.split()[0]) / 20:g} bars" in plain
            if fact["negated"]:
                assert value not in plain
                assert value not in phantom.keywords
                assert "no " in caption


def test_facts_are_balanced(phantoms: list[Phantom]) -> None:
    facts = [f for p in draw_phantoms("balance", 100, 4) for f in p.facts]
    sides = Counter(f["value"] for f in facts if f["type"] == "laterality")
    assert abs(sides["left"] - sides["right"]) < 0.2 * sides.total()
    sizes = Counter(f["value"] for f in facts if f["type"] == "measurement")
    assert set(sizes) == {f"{mm} mm" for mm in SIZES_MM}
    negated = Counter(f["negated"] for f in facts if f["type"] == "finding")
    assert min(negated.values()) > 100
    assert len({f["value"] for f in facts if f["type"] == "device"}) >= 8


@pytest.mark.parametrize("name", SETS)
def test_shipped_sets_are_whole_and_small(name: str) -> None:
    images = open_set(name)
    folder = data_root("calibration") / name
    assert len(images.samples) >= 240
    assert len({s.patient for s in images.samples}) >= 60
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 3_000_000
    assert "not medical images" in json.loads((folder / "set.json").read_text())["statement"]


def test_shipped_sets_share_no_patient_and_no_image() -> None:
    calibration, evaluation = (open_set(n) for n in SETS)
    assert not {s.patient for s in calibration.samples} & {s.patient for s in evaluation.samples}
    pictures = [s.image_path.read_bytes() for x in (calibration, evaluation) for s in x.samples]
    assert len(set(pictures)) == len(pictures)


def test_shipped_sets_are_what_the_script_draws() -> None:
    command = [sys.executable, "tools/draw_phantoms.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
