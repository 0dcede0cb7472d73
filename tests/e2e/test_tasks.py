"""Models that do not caption, from a folder to a checked bundle that answers without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.bundle.manifest import read_manifest
from exporter.cli.main import run
from exporter.core.data import data_root
from tests.e2e.test_deployed import medexport
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_clip import write_tiny_clip
from tests.support.tiny_clipseg import write_tiny_clipseg
from tests.support.tiny_t5 import write_tiny_t5

LABELS = ("ct", "mri", "ultrasound")
REPORT = "There is a 19 mm nodule in the left lower lobe. No pleural effusion."


@dataclass(frozen=True)
class Kind:
    """A tiny model, the task of its bundle, and what it is asked."""

    write: Callable[[Path], Path]
    task: str
    options: tuple[str, ...] = ()
    text: bool = False


KINDS = {
    "clip": Kind(write_tiny_clip, "zero-shot", ("--labels", ",".join(LABELS))),
    "clipseg": Kind(write_tiny_clipseg, "segmentation", ("--labels", "left lung,right lung")),
    "bert": Kind(write_tiny_bert, "text-encoder", text=True),
    "t5": Kind(write_tiny_t5, "summary", ("--max-new-tokens", "8"), text=True),
}
Built = dict[str, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle of each kind, filled as tests ask for it."""
    return {"folder": tmp_path_factory.mktemp("tasks")}


def bundle_of(built: Built, name: str) -> Path:
    if name not in built:
        folder = built["folder"] / name
        KINDS[name].write(folder / "model")
        arguments = ["build", "--model", str(folder / "model"), "--int8", "--limit", "4"]
        arguments += ["--threads", "1", "--offline", "--out", str(folder / "bundle")]
        assert run(arguments) == 0
        built[name] = folder / "bundle"
    return built[name]


def question(name: str, folder: Path) -> list[str]:
    kind = KINDS[name]
    if kind.text:
        (folder / "report.txt").write_text(REPORT, encoding="utf-8")
        return [str(folder / "report.txt"), *kind.options]
    images = sorted((data_root("calibration") / "phantoms-eval" / "images").iterdir())[:2]
    return [*map(str, images), *kind.options]


@pytest.mark.parametrize("name", KINDS)
def test_the_bundle_says_what_it_does_and_answers_without_torch(
    name: str, built: Built, tmp_path: Path
) -> None:
    bundle = bundle_of(built, name)
    manifest = read_manifest(bundle)
    assert manifest.usage.task == KINDS[name].task
    assert manifest.layers, "nothing was quantized"
    assert "equal to torch" in manifest.checks["parity"]
    assert (bundle / "reports" / "report.html").is_file()
    said = medexport("run", bundle, *question(name, tmp_path), "--json", cwd=tmp_path)
    for row in json.loads(said)["results"]:
        check_answer(name, row)


def check_answer(name: str, row: dict[str, Any]) -> None:
    match KINDS[name].task:
        case "zero-shot":
            assert tuple(row["scores"]) == LABELS
            assert sum(row["scores"].values()) == pytest.approx(1)
        case "segmentation":
            assert all(0 <= mask["share"] <= 1 for mask in row["masks"].values())
        case "text-encoder":
            assert np.isfinite(row["embedding"]).all()
            assert len(row["embedding"]) > 8
        case "summary":
            assert 1 <= len(row["tokens"]) <= 8


def test_masks_have_the_images_size(built: Built, tmp_path: Path) -> None:
    bundle = bundle_of(built, "clipseg")
    image, *rest = question("clipseg", tmp_path)
    arguments = ["run", str(bundle), image, *rest[-2:], "--masks", str(tmp_path / "masks")]
    assert run(arguments) == 0
    files = sorted((tmp_path / "masks").iterdir())
    assert len(files) == 2
    for file in files:
        mask = np.asarray(Image.open(file))
        assert mask.shape[::-1] == Image.open(image).size
        assert set(np.unique(mask)) <= {0, 255}
    # A second run would write the same files: refused, nothing is overwritten.
    assert run(arguments) == 3


def test_check_passes_the_same_model_and_fails_another(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(built, "clip")
    other = tmp_path / "other"
    write_tiny_clip(tmp_path / "model", seed=7)
    arguments = ["build", "--model", str(tmp_path / "model"), "--int8", "--no-compare", "--offline"]
    assert run([*arguments, "--out", str(other)]) == 0
    same = ["check", str(bundle), "--baseline", str(bundle), "--limit", "6", "--smoke"]
    assert run(same) == 0
    changed = ["check", str(other), "--baseline", str(bundle), "--limit", "6", "--smoke"]
    assert run([*changed, "--junit", str(tmp_path / "junit.xml")]) == 1
    assert "<failure" in (tmp_path / "junit.xml").read_text(encoding="utf-8")
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "{clip}", "{image}"], 2, "--labels"),
        (["run", "{clip}", "{image}", "--labels", " , "], 2, "no label"),
        (["run", "{clip}", "{image}", "--labels", "ct", "--template", "none"], 2, "template"),
        (["run", "{clip}", "{text}", "--labels", "ct,mri"], 3, "report.txt"),
        (["run", "{clip}", "{image}", "--labels", "ct"], 2, "give two or more"),
        (["run", "{clip}", "{image}", "--labels", "ct,mri", "--masks", "m"], 2, "--masks"),
        (["run", "{bert}", "{image}"], 3, "UTF-8"),
        (["check", "{clip}"], 2, "--baseline"),
        (["compare", "{clip}", "{bert}"], 2, "different things"),
        (["build", "--model", "{folder}/clip/model", "--scheme", "int4-gptq"], 3, "captions"),
        (
            ["export", "{folder}/clip/model", "--dialect", "standard", "--out", "{folder}/x"],
            3,
            "captioners",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str],
    code: int,
    said: str,
    built: Built,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "clip": bundle_of(built, "clip"),
        "bert": bundle_of(built, "bert"),
        "folder": built["folder"],
        "image": question("clip", tmp_path)[0],
        "text": question("bert", tmp_path)[0],
    }
    capsys.readouterr()
    assert run([a.format(**places) for a in arguments]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("medexport: ")
    assert said in line
