"""`medexport run`: which options a bundle takes, labels, names of masks, the modality of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    Lineage,
    Manifest,
    Source,
    Usage,
    encode_manifest,
)
from exporter.bundle.package import BundleParts, package
from exporter.cli.answers import mask_files
from exporter.cli.main import run
from exporter.cli.run import OPTIONS, fill_prompt
from exporter.core.errors import InputRefused, WrongUsage
from exporter.graphs.export import export_model
from tests.support.tiny import write_tiny_model
from tests.support.tiny_clip import write_tiny_clip
from tests.support.tiny_clipseg import write_tiny_clipseg

WRITE = {"clip": write_tiny_clip, "clipseg": write_tiny_clipseg, "idefics3": write_tiny_model}
TASKS = {"clip": "zero-shot", "clipseg": "segmentation", "idefics3": "caption"}
PROMPT = "Describe this {modality} image."
LINEAGE = Lineage(base=Source(name="tiny", sha256="0" * 64))


class Bundles:
    """A float bundle of each kind, made when a test asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, kind: str) -> Path:
        root = self._folder / kind
        if not root.exists():
            for name in ("merged", "exported"):
                (root / name).mkdir(parents=True)
            merge_adapters(WRITE[kind](root / "base"), [], root / "merged")
            export_model(root / "merged", root / "exported")
            usage = Usage(family=kind, prompt=PROMPT, max_new_tokens=4, task=TASKS[kind])
            package(
                root / "bundle",
                BundleParts(
                    name="tiny", exported=root / "exported", scheme="fp16", target="cpu-avx2",
                    usage=usage, lineage=LINEAGE, tools={}, checks={}, statement="test",
                ),
            )  # fmt: skip
        return root / "bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("run"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return picture(tmp_path / "x.png", 1)


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """stdout when it went well, the one line of the error otherwise."""
    capsys.readouterr()
    assert run(["run", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    if code:
        assert err.count("\n") == 1
        assert out == ""
    return err if code else out


GIVEN = {
    "prompt": "Say.",
    "modality": "ct",
    "labels": "ct,mri",
    "labels_file": "labels.txt",
    "template": "a {}",
    "masks": "masks",
    "max_new_tokens": "3",
    "device": "cuda",
    "runtime": "tensorrt",
}
WRONG = [(task, name) for task, takes in OPTIONS.items() for name in GIVEN if name not in takes]


def only_manifest(folder: Path, task: str) -> Path:
    """A bundle that goes no further than its options."""
    folder.mkdir()
    usage = Usage(family="any", prompt="", max_new_tokens=4, task=task)
    manifest = Manifest(
        schema=SCHEMA, name="tiny", scheme="fp16", target="cpu-avx2", dialect="ort", usage=usage,
        lineage=LINEAGE, layers=(), floats=(), tools={}, checks={}, statement="test", files=(),
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return folder


@pytest.mark.parametrize(("task", "name"), WRONG)
def test_an_option_without_a_use_is_refused(
    task: str, name: str, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, option = only_manifest(tmp_path / "b", task), "--" + name.replace("_", "-")
    line = said(capsys, bundle, image, "--no-verify", option, GIVEN[name], code=2)
    assert line.startswith(f"medexport: {option}: without a use here; this bundle's task is {task}")
    for taken in OPTIONS[task]:
        assert f"--{taken.replace('_', '-')}" in line
    assert not (tmp_path / "masks").exists()


def test_all_options_without_a_use_are_named_at_once(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = only_manifest(tmp_path / "b", "summary")
    given = ("--masks", tmp_path, "--template", "{}", "--prompt", "Say.", "--threads", "1")
    line = said(capsys, bundle, image, "--no-verify", *given, code=2)
    assert "--masks, --template: without a use" in line


def test_a_task_of_a_newer_release_is_refused(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = only_manifest(tmp_path / "b", "translation")
    line = said(capsys, bundle, image, "--no-verify", code=3)
    assert "task 'translation'; use the medexport that made this bundle" in line


def test_one_label_on_one_image_is_no_question(
    bundles: Bundles, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for labels in ("pneumothorax", "pneumothorax, pneumothorax"):
        line = said(capsys, bundles["clip"], image, "--labels", labels, code=2)
        assert "one label, 'pneumothorax'" in line
        assert "give two or more" in line


def test_one_label_ranks_images_without_percentages(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    arguments = (bundles["clip"], *paths, "--labels", "pneumothorax")
    found = json.loads(said(capsys, *arguments, "--json"))
    assert found["scoring"] == "images ranked by cosine"
    assert [set(row) for row in found["results"]] == [{"input", "cosines"}] * 3
    cosines = {row["input"]: row["cosines"]["pneumothorax"] for row in found["results"]}
    expected = sorted(cosines, key=lambda name: -cosines[name])
    assert found["retrieval"] == {"pneumothorax": expected}
    head, *lines = said(capsys, *arguments).splitlines()
    assert head.startswith("best for 'pneumothorax'")
    assert lines == [f"{i}. {name}: {cosines[name]:.4f}" for i, name in enumerate(expected, 1)]
    # A second label changes no cosine, and brings the probabilities back.
    both = json.loads(said(capsys, *arguments[:-1], "pneumothorax,no finding", "--json"))
    for row in both["results"]:
        assert row["cosines"]["pneumothorax"] == pytest.approx(cosines[row["input"]], abs=1e-5)
        assert sum(row["scores"].values()) == pytest.approx(1)


def test_masks_of_images_of_one_name_have_names_of_their_own(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [picture(tmp_path / "a" / "x.png", 1), picture(tmp_path / "b" / "x.png", 2)]
    arguments = ["--labels", "left lung,right lung", "--masks"]
    out = tmp_path / "masks"
    found = json.loads(said(capsys, bundles["clipseg"], *paths, *arguments, out, "--json"))
    names = [mask["file"] for row in found["results"] for mask in row["masks"].values()]
    expected = ["01-x-01.png", "01-x-02.png", "02-x-01.png", "02-x-02.png"]
    assert names == [str(out / name) for name in expected]
    assert sorted(p.name for p in out.iterdir()) == expected
    for position, path in enumerate(paths, 1):
        alone = tmp_path / f"alone-{position}"
        said(capsys, bundles["clipseg"], path, *arguments, alone)
        for number in (1, 2):
            mask = (out / f"{position:02d}-x-{number:02d}.png").read_bytes()
            assert mask == (alone / f"x-{number:02d}.png").read_bytes()


@pytest.mark.parametrize("reason", ["taken", "bad image"])
def test_no_mask_is_written_where_one_cannot_be(
    reason: str, bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = [picture(tmp_path / "x.png", 1), tmp_path / "y.png"], tmp_path / "masks"
    if reason == "taken":
        picture(paths[1], 2)
        out.mkdir()
        (out / "y-01.png").write_bytes(b"mine")
    else:
        paths[1].write_text("no image")
    line = said(capsys, bundles["clipseg"], *paths, "--labels", "lung", "--masks", out, code=3)
    assert ("y-01.png: exists; remove it" if reason == "taken" else "y.png") in line
    assert [p.read_bytes() for p in out.glob("*")] == ([b"mine"] if reason == "taken" else [])


def test_names_of_masks(tmp_path: Path) -> None:
    def names(*inputs: str) -> list[str]:
        files = mask_files(tmp_path, [Path(i) for i in inputs], 1)
        return [file.name for (file,) in files]

    assert names("a/x.png", "b/y.png") == ["x-01.png", "y-01.png"]
    assert names("x.png", "y.dcm", "x.dcm") == ["01-x-01.png", "02-y-01.png", "03-x-01.png"]
    # One file on a disk that does not tell them apart.
    assert names("x.png", "X.png") == ["01-x-01.png", "02-X-01.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputRefused, match="is a file; give --masks a folder"):
        mask_files(tmp_path / "file", [Path("x.png")], 1)


def test_the_modality_stands_in_the_prompt(
    bundles: Bundles, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def caption(*options: str) -> dict[str, Any]:
        found = json.loads(said(capsys, bundles["idefics3"], image, "--json", *options))
        (row,) = found["results"]
        return {"prompt": found["prompt"], "tokens": row["tokens"], "read": row["prompt_tokens"]}

    own = caption("--modality", " ct ")
    assert own["prompt"] == "Describe this ct image."
    assert own == caption("--prompt", "Describe this ct image.")
    given = caption("--prompt", "What does the {modality} show?", "--modality", "mri")
    assert given == caption("--prompt", "What does the mri show?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "names the modality, and none was given; give --modality TEXT"),
        (("--modality", " "), "none was given"),
        (("--prompt", "A {modality}?"), "'A {modality}?' names the modality"),
        (("--prompt", "Say.", "--modality", "ct"), "'Say.' has no place for it"),
    ],
)
def test_a_modality_and_its_place_come_together(
    options: tuple[str, ...],
    words: str,
    bundles: Bundles,
    image: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in said(capsys, bundles["idefics3"], image, *options, code=2)


def test_a_prompt_without_the_place_is_as_it_is() -> None:
    assert fill_prompt("Say {this}.", None) == "Say {this}."
    with pytest.raises(WrongUsage):
        fill_prompt("", "ct")


def test_help_says_how_many_labels(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, "--help").split())
    assert "Zero-shot: two or more" in text
    assert "for a prompt with {modality}" in text
