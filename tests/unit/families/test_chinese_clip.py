"""Chinese-CLIP: its names, sizes and settings against transformers' class, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ChineseCLIPConfig

from exporter.adapters.merge import merge_adapters
from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS
from exporter.families.check import config_value
from exporter.families.shapes.find import shape_of, shape_of_config
from exporter.families.table import TASK_FAMILIES, config_defaults
from exporter.families.task_models.chinese_clip import (
    CONTEXT,
    graphs,
    newest_config,
    open_preparer,
)
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, task_tensors
from exporter.graphs.export import export_model
from exporter.runtimes.graphs import OrtGraphs
from exporter.runtimes.tasks.zero_shot import ZeroShot
from exporter.runtimes.torch_reference import load_model
from tests.support.task_inputs import noise
from tests.support.tiny_chinese_clip import (
    LABELS,
    POSITIONS,
    REPORTS,
    chinese_model,
    write_tiny_chinese_clip,
)

torch.set_num_threads(1)
PROFILE = "chinese-clip-vit-base-patch16"
# For plans alone: the class has no such key.
NOT_OF_THE_CLASS = {"text_config.context_length"}
WORDS = "text_model.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chinese_clip(tmp_path_factory.mktemp("chinese_clip"))


@pytest.fixture(scope="module")
def merged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    merge_adapters(folder, [], out)
    return out


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def changed(folder: Path, out: Path, name: str, edit: Callable[[Any], None]) -> Path:
    """A copy of `folder` with one JSON file changed."""
    copy = shutil.copytree(folder, out / "copy")
    content = read(copy / name)
    edit(content)
    (copy / name).write_text(json.dumps(content), encoding="utf-8")
    return copy


def published_config() -> dict[str, Any]:
    """A config.json with every known fact of the profile."""
    config: dict[str, Any] = {"model_type": "chinese_clip", "text_config": {}, "vision_config": {}}
    for key, value in known_config(find_model(PROFILE)).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


def test_published_sizes_give_the_tensors_of_the_real_class() -> None:
    config, profile = published_config(), find_model(PROFILE)
    expected = {n: tuple(p.shape) for n, p in chinese_model(config).named_parameters()}
    listed = task_tensors(TASK_FAMILIES["chinese_clip"], config)
    assert {t.name: t.shape for t in listed} == expected
    total = sum(int(np.prod(shape)) for shape in expected.values())
    assert total == profile.facts.parameters == shape_of(profile).parameters
    # The repository's pytorch_model.bin has 753 MB: float32 without a pooler.
    assert round(4 * total / 1e6) == 753
    assert round(4 * (total + 768 * 769) / 1e6) == 755


def test_other_sizes_are_counted_too(folder: Path) -> None:
    config = read(folder / "config.json")
    expected = sum(p.numel() for p in chinese_model(config).parameters())
    shape = shape_of_config("tiny", "chinese_clip", config, {})
    assert shape.parameters == expected
    assert shape.tower is not None
    assert shape.text is not None
    assert (shape.tower.sequence, shape.text.sequence) == (17, CONTEXT)


def test_defaults_are_those_of_the_config_class() -> None:
    real = ChineseCLIPConfig().to_dict()
    empty: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    for key in config_defaults("chinese_clip").keys() - NOT_OF_THE_CLASS:
        section, _, leaf = key.rpartition(".")
        found = config_value(empty, key, "chinese_clip")
        assert found == (real[section] if section else real)[leaf], key
    expected = {n: tuple(p.shape) for n, p in chinese_model({}).named_parameters()}
    listed = task_tensors(TASK_FAMILIES["chinese_clip"], {"model_type": "chinese_clip"})
    assert {t.name: t.shape for t in listed} == expected


def test_roles_tell_pixels_from_text(folder: Path) -> None:
    found = graphs(read(folder / "config.json"))
    assert list(found) == [VISION_GRAPH, TEXT_GRAPH]
    vision, text = (list(found[name].tensors()) for name in (VISION_GRAPH, TEXT_GRAPH))
    assert {t.role for t in vision} == {"vision", "float"}
    assert {t.role for t in text} == {"embedding", "decoder", "float"}
    assert all(t.reason for t in (*vision, *text) if t.role == "float")


def test_the_older_form_of_a_config_counts_before_the_newer() -> None:
    text = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    config = {"text_config_dict": text, "text_config": {"vocab_size": 7, "num_hidden_layers": 1}}
    expected = {n: tuple(p.shape) for n, p in chinese_model(dict(config)).named_parameters()}
    for form in (config, newest_config(config)):
        listed = task_tensors(TASK_FAMILIES["chinese_clip"], form)
        assert {t.name: t.shape for t in listed} == expected
    # The class reads the new form as the old one.
    again = {n: tuple(p.shape) for n, p in chinese_model(newest_config(config)).named_parameters()}
    assert again == expected


def test_the_row_of_the_padding_token_is_kept(folder: Path, merged: Path) -> None:
    """transformers 5 sets it to zero with the published pad_token_id, whatever was stored."""
    stored = torch.from_numpy(Checkpoint.open(merged).float32(WORDS))
    assert stored[0].abs().max() > 0
    config = read(merged / "config.json")
    model = load_model(merged, config)
    assert torch.equal(model.get_parameter(WORDS), stored)
    config["text_config"]["pad_token_id"] = read(folder / "config.json")["text_config"][
        "pad_token_id"
    ]
    assert load_model(merged, config).get_parameter(WORDS)[0].abs().max() == 0


def test_merging_drops_the_buffers_and_nothing_else(folder: Path, merged: Path) -> None:
    base, kept = Checkpoint.open(folder).tensors.keys(), Checkpoint.open(merged).tensors.keys()
    weights = {name for name in base if not BUFFERS.search(name)}
    assert weights < base
    assert {name for name in kept if not BUFFERS.search(name)} == weights


def test_a_repository_with_a_vocabulary_alone_is_told_what_to_do(tmp_path: Path) -> None:
    folder = write_tiny_chinese_clip(tmp_path / "model", tokenizer=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match=r"no tokenizer\.json.*AutoTokenizer save one") as caught:
        merge_adapters(folder, [], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_probabilities_are_those_of_the_library(merged: Path, tmp_path: Path) -> None:
    """`medexport run --labels` against ChineseCLIPProcessor's inputs and the model's own forward."""
    from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
        ChineseCLIPImageProcessorPil,
    )

    export_model(merged, tmp_path, float_storage="float32", accuracy_level=0)
    ours = ZeroShot(OrtGraphs(tmp_path / "model", threads=1))
    assert ours.template == "{}的照片"
    pictures = [noise(64, 64), noise(97, 31)]
    found = ours.scores(pictures, LABELS)
    texts = AutoTokenizer.from_pretrained(merged)(
        [f"{label}的照片" for label in LABELS], padding=True, return_tensors="pt"
    )
    images = ChineseCLIPImageProcessorPil.from_pretrained(merged)(pictures, return_tensors="np")
    pixels = torch.from_numpy(images["pixel_values"])
    model = load_model(merged, read(merged / "config.json"))
    with torch.inference_mode():
        expected = model(pixel_values=pixels, **texts).logits_per_image.softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize(
    ("declared", "longest"),
    [(None, CONTEXT), (10**30, CONTEXT), (20, 20), (60, 60), (512, CONTEXT)],
)
def test_texts_are_cut_where_the_tokenizer_says_or_at_52(
    folder: Path, tmp_path: Path, declared: int | None, longest: int
) -> None:
    def edit(settings: dict[str, Any]) -> None:
        settings["model_max_length"] = declared

    copy = changed(folder, tmp_path, "tokenizer_config.json", edit)
    found = open_preparer(copy).texts([REPORTS[3] * 4, "气胸"])
    ids, mask = found["input_ids"], found["attention_mask"]
    assert ids.shape == mask.shape == (2, longest)
    assert longest <= POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert ids[0, -1] == tokenizer.sep_token_id
    assert ids[1].tolist()[:5] == [*tokenizer("气胸")["input_ids"], 0]
    assert mask.sum(1).tolist() == [longest, 4]


def test_a_model_of_fewer_places_cuts_there(tmp_path: Path) -> None:
    folder = write_tiny_chinese_clip(tmp_path, text={"max_position_embeddings": 30})
    assert open_preparer(folder).texts([REPORTS[3] * 4])["input_ids"].shape == (1, 30)


@pytest.mark.parametrize(
    "kind", ["CLIPImageProcessor", "ChineseCLIPImageProcessor", "ChineseCLIPImageProcessorPil"]
)
def test_newer_names_of_the_image_settings_give_the_same_pixels(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    picture = [noise(97, 31)]
    expected = open_preparer(folder).images(picture)["pixel_values"]

    def edit(settings: dict[str, Any]) -> None:
        del settings["feature_extractor_type"]
        settings |= {"image_processor_type": kind, "crop_size": {"height": 9, "width": 9}}

    copy = changed(folder, tmp_path, "preprocessor_config.json", edit)
    assert np.array_equal(open_preparer(copy).images(picture)["pixel_values"], expected)


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        (
            "preprocessor_config.json",
            lambda c: c.update(size={"height": 48, "width": 48}),
            "images become (48, 48)",
        ),
        # The repository's first revision, which transformers reads as a shortest edge.
        ("preprocessor_config.json", lambda c: c.update(size=32), "images become of any size"),
        ("preprocessor_config.json", lambda c: c.update(size="big"), "bad image settings"),
        (
            "preprocessor_config.json",
            lambda c: c.update(image_processor_type="ViTImageProcessor"),
            "settings of 'ViTImageProcessor'; expected one of CLIPImageProcessor",
        ),
        (
            "config.json",
            lambda c: c["text_config"].update(vocab_size=20),
            "belong to different models",
        ),
        ("tokenizer.json", lambda c: c.update(post_processor=None), "expected [CLS] and [SEP]"),
    ],
)
def test_files_that_disagree_are_refused(
    folder: Path, tmp_path: Path, name: str, edit: Callable[[Any], None], what: str
) -> None:
    copy = changed(folder, tmp_path, name, edit)
    with pytest.raises(InputRefused) as caught:
        open_preparer(copy)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"text_config": {"hidden_size": 50, "num_attention_heads": 4}}, "expected a multiple"),
        ({"text_config": {"is_decoder": True}}, "expected an encoder"),
        ({"text_config": {"hidden_act": "quick_gelu"}}, "text_config.hidden_act is 'quick_gelu'"),
        ({"text_config": 3}, "text_config is 3; expected an object"),
        ({"vision_config": {"num_channels": 1}}, "1 channels"),
        ({"projection_dim": 0}, "config.projection_dim is 0"),
    ],
)
def test_bad_configs_are_refused_in_one_line(config: dict[str, Any], what: str) -> None:
    with pytest.raises(InputRefused) as caught:
        graphs({"model_type": "chinese_clip", **config})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
