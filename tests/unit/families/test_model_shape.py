"""Shapes from facts: exact parameter counts, and the sequences that follow from image limits."""

from __future__ import annotations

import math

import msgspec
import pytest

from exporter.catalog.profiles import find_model, model_profiles
from exporter.catalog.shapes import known_config, tensor_table
from exporter.core.data import data_root
from exporter.core.errors import InputRefused
from exporter.families.prompts.idefics3 import image_text
from exporter.families.shapes.find import SHAPES, image_limits, shape_of, shape_of_config

# Published counts, kept here apart from the profiles. Most follow from exact file sizes.
PUBLISHED = {
    "llava-1.5-7b": 7063427072,
    "llava-v1.6-vicuna-7b": 7063431168,
    "llava-v1.6-mistral-7b": 7566747648,
    "llava-med-v1.5-mistral-7b": 7566219264,
    "qwen2-vl-2b-instruct": 2208985600,
    "qwen2.5-vl-3b-instruct": 3754622976,
    "idefics-9b-instruct": 8929679632,
    "moondream2": 1866919792,
    "vit-gpt2-image-captioning": 239195904,
    "blip2-opt-2.7b": 3744761856,
    "smolvlm-256m": 256484928,
    "smolvlm-500m": 507482304,
    "smolvlm-2.2b": 2246272880,
    "clip-vit-base-patch32": 151277313,
    "clip-vit-large-patch14": 427616513,
    "clip-vit-large-patch14-336": 427944193,
    "clipseg-rd64-refined": 150747746,
    "distilbert-base-uncased": 66985530,
    "tinybert-general-4l-312d": 14350248,
    "bio-clinicalbert": 108310272,
    "t5-small": 60506624,
}
MODELS = sorted(model_profiles())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_the_published_count(name):
    assert shape_of(find_model(name)).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", [n for n in MODELS if find_model(n).facts.tensor_shapes])
def test_parameters_are_those_of_the_tensor_table(name):
    profile = find_model(name)
    total = sum(math.prod(shape) for shape in tensor_table(profile).values())
    assert shape_of(profile).parameters == total


@pytest.mark.parametrize(
    ("name", "tokens", "tiles"),
    [
        ("llava-1.5-7b", 576, 1),
        # Recorded for a 560 x 560 image: 24 x 24 + 48 x (48 + 1).
        ("llava-v1.6-mistral-7b", 2928, 5),
        ("moondream2", 729, 13),
        ("idefics-9b-instruct", 3, 1),
        ("vit-gpt2-image-captioning", 0, 1),
        ("blip2-opt-2.7b", 32, 1),
        # 16 tiles and the whole image, 64 rows each, 32 + 4 + 3 markers.
        ("smolvlm-500m", 17 * 64 + 39, 17),
        # 1280 rows between two markers.
        ("qwen2.5-vl-3b-instruct", 1282, 1),
    ],
)
def test_image_tokens_at_the_limit(name, tokens, tiles):
    shape = shape_of(find_model(name))
    assert shape.decoder.image_tokens == tokens
    assert shape.tower.tiles == tiles


def test_image_tokens_are_what_the_family_writes_into_the_prompt():
    tokenizers = pytest.importorskip("tokenizers")
    file = data_root("profiles") / "demo/model/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    written = tokenizer.encode(image_text(2, 2, 4), add_special_tokens=False).ids
    assert shape_of(find_model("demo")).decoder.image_tokens == len(written)


def test_windows_leave_full_attention_to_few_layers():
    tower = shape_of(find_model("qwen2.5-vl-3b-instruct")).tower
    assert tower.sequence == 1280 * 4
    assert [i for i, seen in enumerate(tower.attended) if seen == tower.sequence] == [7, 15, 23, 31]
    assert {seen for seen in tower.attended if seen != tower.sequence} == {64}


def test_fewer_pixels_give_fewer_tokens():
    profile = find_model("qwen2-vl-2b-instruct")
    small = msgspec.structs.replace(profile, max_pixels=256 * 28 * 28)
    assert shape_of(small).decoder.image_tokens == 256 + 2
    unbounded = msgspec.structs.replace(profile, max_pixels=None)
    assert shape_of(unbounded).decoder.image_tokens == 16384 + 2


def test_cache_of_grouped_and_cross_attention():
    mistral = shape_of(find_model("llava-v1.6-mistral-7b")).decoder
    assert mistral.cache_values(1) == 2 * 32 * 8 * 128
    gpt2 = shape_of(find_model("vit-gpt2-image-captioning")).decoder
    assert gpt2.cache_values(10) == 2 * 12 * 10 * 768 + 2 * 12 * 197 * 768
    idefics = shape_of(find_model("idefics-9b-instruct")).decoder
    assert idefics.cache_values(0) == 2 * 8 * 64 * 4096


def test_a_tied_head_is_one_matrix_used_once_a_token():
    weights = shape_of(find_model("qwen2-vl-2b-instruct")).weights
    assert not [w for w in weights if w.role == "head"]
    (table,) = [w for w in weights if w.role == "embedding"]
    assert (table.rows, table.columns, table.rows_in) == (151936, 1536, 1)


def test_a_config_gives_the_shape_of_its_profile():
    profile = find_model("smolvlm-500m")
    config: dict = {"model_type": "idefics3", "text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    # Absent in the published file: the class defaults are the same values.
    for section, key in [
        ("text_config", "num_hidden_layers"),
        ("vision_config", "intermediate_size"),
    ]:
        del config[section][key]
    image = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    assert shape_of_config("x", "idefics3", config, image) == shape_of(profile)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "idefics3"},
            r"vision_config\.image_size is not published.*expected .* in the folder's config\.json",
        ),
        ({"model_type": "eva"}, "model_type 'eva' has no known shape"),
    ],
)
def test_an_unknown_size_is_said(config, words):
    with pytest.raises(InputRefused, match=words) as caught:
        shape_of_config("x", "no family", config, {})
    assert "\n" not in str(caught.value)
    assert "--model" not in str(caught.value), "a folder was given"


def test_a_size_that_no_profile_says_may_stand_in_a_folder():
    profile = find_model("clipseg")
    facts = msgspec.structs.replace(profile.facts, preprocessor={})
    with pytest.raises(InputRefused, match="size is not published.*give --model DIR or --weights"):
        shape_of(msgspec.structs.replace(profile, facts=facts))


@pytest.mark.parametrize(
    ("image", "side"),
    [
        ({"size": 352}, 352),
        ({"size": {"height": 352, "width": 352}}, 352),
        ({"size": {"height": 352, "width": 224}}, (352, 224)),
        ({"size": 256, "crop_size": 224}, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224),
        ({"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": False}, None),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, None),
        ({"size": {"longest_edge": 2048}}, None),
        ({}, None),
    ],
)
def test_the_side_of_prepared_images_is_read_from_every_published_form(image, side):
    assert image_limits(image).get("size") == side


def test_clipseg_of_a_folder_has_the_sizes_of_its_profile():
    profile = find_model("clipseg")
    config: dict = {"model_type": "clipseg", "text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    for size in (352, {"height": 352, "width": 352}):
        found = shape_of_config(profile.title, "clipseg", config, {"size": size})
        assert found == shape_of(profile)
    with pytest.raises(InputRefused, match="image processor: size is .352, 224"):
        shape_of_config("x", "clipseg", config, {"size": {"height": 352, "width": 224}})


@pytest.mark.parametrize("bad", ["wide", True, 0, -1, 1.5])
def test_a_size_that_is_none_is_refused(bad):
    config = {"model_type": "idefics3", "text_config": {"hidden_size": bad}}
    with pytest.raises(InputRefused, match="expected a positive integer"):
        shape_of_config("x", "idefics3", config, {})


@pytest.mark.parametrize("name", MODELS)
def test_every_profile_has_a_shape(name):
    profile = find_model(name)
    assert profile.facts.model_type in SHAPES
    assert shape_of(profile).parameters > 0
