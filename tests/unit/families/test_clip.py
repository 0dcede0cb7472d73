"""CLIP's specs, texts and settings: what is read from a folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.families.base import TensorSpec
from exporter.families.check import config_value
from exporter.families.specs.clip import ClipImage, ClipText, clip_image, clip_text
from exporter.families.table import TASK_FAMILIES, config_defaults
from exporter.families.task_models.clip import graphs, open_preparer
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, task_tensors
from tests.support.tiny_clip import CONTEXT, write_tiny_clip

torch.set_num_threads(1)
PROFILES = ("clip-vit-base-patch32", "clip-vit-large-patch14", "clip-vit-large-patch14-336")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def changed(folder: Path, out: Path, name: str, edit: Callable[[Any], None]) -> Path:
    """A copy of `folder` with one JSON file changed."""
    copy = shutil.copytree(folder, out / "copy")
    content = json.loads((copy / name).read_text())
    edit(content)
    (copy / name).write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize("name", PROFILES)
def test_published_sizes_give_the_tensors_of_the_real_class(name: str) -> None:
    profile = find_model(name)
    config: dict[str, Any] = {"model_type": "clip", "text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    listed = task_tensors(TASK_FAMILIES["clip"], config)
    assert {t.name: t.shape for t in listed} == expected
    assert sum(p.numel() for p in model.parameters()) == profile.facts.parameters


def test_defaults_are_those_of_the_config_class() -> None:
    real = CLIPConfig().to_dict()
    empty: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    for key in config_defaults("clip"):
        section, _, leaf = key.rpartition(".")
        assert config_value(empty, key, "clip") == (real[section] if section else real)[leaf], key
    text, image = clip_text({}), clip_image({})
    assert (text.hidden_size, text.heads, text.max_positions) == (512, 8, 77)
    assert (text.end, text.activation, text.norm_eps) == (49407, "quick_gelu", 1e-5)
    assert (image.tower.hidden_size, image.tower.image_size, image.output_size) == (768, 224, 512)
    assert image.tower.used_layers == image.tower.layers == 12


def test_roles_tell_pixels_from_text(folder: Path) -> None:
    found = graphs(json.loads((folder / "config.json").read_text()))
    assert list(found) == [VISION_GRAPH, TEXT_GRAPH]
    vision, text = (list(found[name].tensors()) for name in (VISION_GRAPH, TEXT_GRAPH))
    assert {t.role for t in vision} == {"vision", "float"}
    assert {t.role for t in text} == {"embedding", "decoder", "float"}
    floats: list[TensorSpec] = [t for t in (*vision, *text) if t.role == "float"]
    assert all(t.reason for t in floats)
    matrices = [t for t in (*vision, *text) if len(t.shape) == 2 and t.role == "float"]
    assert {t.name.rpartition(".")[0].rpartition(".")[2] for t in matrices} == {
        "position_embedding"
    }


def test_an_inner_clip_has_a_prefix() -> None:
    names = [t.name for half in (clip_text, clip_image) for t in half({}, "clip.").tensors()]
    assert {n.partition(".")[0] for n in names} == {"clip"}


def test_the_older_form_of_a_config_counts_before_the_newer() -> None:
    config = {
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "text_config": {"hidden_size": 640, "eos_token_id": 2, "num_hidden_layers": 3},
        "vision_config_dict": None,
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16},
        "projection_dim": 768,
    }
    real = CLIPConfig(**config)
    text, image = clip_text(config), clip_image(config)
    assert (text.hidden_size, text.layers, text.end) == (768, 12, 49407)
    assert (text.hidden_size, text.layers, text.end) == (
        real.text_config.hidden_size,
        real.text_config.num_hidden_layers,
        real.text_config.eos_token_id,
    )
    assert image.tower.hidden_size == real.vision_config.hidden_size == 1024


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"text_config": {"hidden_size": 50, "num_attention_heads": 4}}, "divisible by the heads"),
        ({"text_config": {"vocab_size": 100}}, "an end token among the tokens"),
        ({"text_config": {"eos_token_id": [49407]}}, "text_config.eos_token_id"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act is 'relu'"),
        ({"text_config": 3}, "text_config is 3; expected an object"),
        ({"vision_config": {"num_channels": 1}}, "1 channels"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size"),
        ({"projection_dim": 0}, "config.projection_dim is 0"),
    ],
)
def test_bad_configs_are_refused_in_one_line(config: dict[str, Any], what: str) -> None:
    with pytest.raises(InputRefused) as caught:
        graphs({"model_type": "clip", **config})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_texts_end_with_their_end_token(folder: Path) -> None:
    found = open_preparer(folder).texts(["right lobe of the liver " * 30, "CT"])
    ids, mask = found["input_ids"], found["attention_mask"]
    assert ids.shape == mask.shape == (2, CONTEXT)
    assert ids.dtype == mask.dtype == np.int64
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert ids[0, -1] == end
    assert mask.sum(1).tolist()[0] == CONTEXT
    assert 0 < mask[1].sum() < CONTEXT
    # Lower case and upper case are the same text.
    same = open_preparer(folder).texts(["ct", "CT"])["input_ids"]
    assert np.array_equal(same[0], same[1])


def test_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(InputRefused, match="no text was given"):
        open_preparer(folder).texts([])


def test_the_template_is_the_papers(folder: Path) -> None:
    assert open_preparer(folder).template.format("cat") == "a photo of a cat."


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("preprocessor_config.json", lambda c: c.update(crop_size=48), "images become (48, 48)"),
        ("preprocessor_config.json", lambda c: c.update(size="big"), "bad image settings"),
        (
            "preprocessor_config.json",
            lambda c: c.update(image_processor_type="ViTImageProcessor"),
            "settings of 'ViTImageProcessor'; expected one of CLIPImageProcessor",
        ),
        ("tokenizer_config.json", lambda c: c.update(pad_token="<none>"), "pad token '<none>'"),
        (
            "config.json",
            lambda c: c["text_config"].update(vocab_size=300, eos_token_id=299),
            "belong to different models",
        ),
        (
            "config.json",
            lambda c: c["text_config"].update(eos_token_id=5),
            "expected its last token, and only that, to be 5",
        ),
        (
            "tokenizer.json",
            lambda c: c.update(post_processor=None),
            "expected its last token, and only that, to be the highest of all",
        ),
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


def test_examples_are_of_two_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    image, text = clip_image(config), clip_text(config)
    assert isinstance(image, ClipImage)
    assert isinstance(text, ClipText)
    for spec in (image, text):
        feeds = list(spec.example_feeds(np.random.default_rng(0)))
        assert len({str({n: a.shape for n, a in f.items()}) for f in feeds}) == 2
    padded = list(text.example_feeds(np.random.default_rng(0)))[1]
    assert padded["attention_mask"].min() == 0
    ended = padded["input_ids"] == text.vocab_size - 1
    assert ended.any(1).all()
