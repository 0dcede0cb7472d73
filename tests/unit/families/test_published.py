"""Layouts that transformers has no class for: names both ways, config, and the files left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.llava import PUBLISHED, decoder_spec, open_preparer, tower_spec
from exporter.families.checkpoints import modern_config
from exporter.families.layouts.llava_med import LLAVA_MED_TEMPLATE
from tests.support.tiny_llava import write_tiny_llava_med

NAMES = PUBLISHED["llava_mistral"].names
# Read in the original code and the conversion script of transformers.
KNOWN = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.31.self_attn.q_proj.weight": "model.language_model.layers.31.self_attn.q_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    ),
}


@pytest.fixture(scope="module")
def llava_med(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava_med(tmp_path_factory.mktemp("llava-med"))


def test_known_names_both_ways() -> None:
    assert {old: NAMES.newest(old) for old in KNOWN} == KNOWN
    assert {NAMES.published(new): new for new in KNOWN.values()} == KNOWN


def test_a_checkpoint_goes_to_the_newest_names_and_back(llava_med: Path, tmp_path: Path) -> None:
    merge_adapters(llava_med, [], tmp_path)
    before, after = Checkpoint.open(llava_med), Checkpoint.open(tmp_path)
    config = json.loads((llava_med / "config.json").read_text())
    expected = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    assert {t.name: t.shape for t in expected} == {n: i.shape for n, i in after.tensors.items()}
    back = after.renamed(NAMES.published)
    assert back.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        assert np.array_equal(back.raw(name), before.raw(name))


def test_the_merged_folder_says_everything(llava_med: Path, tmp_path: Path) -> None:
    merge_adapters(llava_med, [], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llava", "mistral")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (tmp_path / "chat_template.jinja").read_text() == LLAVA_MED_TEMPLATE
    published = decoder_spec(json.loads((llava_med / "config.json").read_text()))
    assert decoder_spec(config) == published
    assert open_preparer(tmp_path).image_token_id == 0


def test_the_published_image_settings_are_clips_behind_a_square() -> None:
    images: Any = PUBLISHED["llava_mistral"].files["preprocessor_config.json"]
    assert images["do_pad"]
    assert images["crop_size"] == {"height": 336, "width": 336}


def test_a_folder_without_tokenizer_json_is_refused(llava_med: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava_med, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match=r"no tokenizer\.json"):
        merge_adapters(folder, [], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "linear"),
        ("image_aspect_ratio", "anyres"),
        ("mm_vision_select_feature", "cls"),
        ("mm_hidden_size", 1152),
        ("mm_vision_tower", "google/siglip-so400m-patch14-384"),
    ],
)
def test_other_models_of_the_original_code_are_refused(key: str, value: object) -> None:
    with pytest.raises(InputRefused, match=rf"config\.json: .*{key}"):
        modern_config({"model_type": "llava_mistral", key: value})


def test_a_config_of_transformers_stays_as_it_is() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    assert modern_config(config) == config
