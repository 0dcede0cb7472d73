"""Qwen2-VL's images, tokens, positions and windows against transformers' own."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.families.captioners.qwen_vl import decoder_spec, open_preparer, tower_spec
from exporter.families.check import check_config, config_value
from exporter.families.images.qwen import target_size
from exporter.families.prompts.qwen import positions
from exporter.families.specs.qwen_vision import patch_positions, vision_feed, windows
from exporter.families.table import config_defaults
from tests.support.tiny_qwen import MERGE, PATCH, write_tiny_qwen

PROMPT = "Describe this medical image."
SIZES = [[(64, 64)], [(31, 77), (64, 20), (8, 8)], [(300, 200)], [(5, 3)], [(9, 180)], []]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def library_inputs(folder: Path, images: list[Image.Image], prompt: str) -> dict[str, np.ndarray]:
    """Ids, pixels and grids by transformers' tokenizer, template and image processor."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    found: dict[str, np.ndarray] = {}
    if images:
        out = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="np")
        found = {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}
        for grid in out["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "\0" * (int(grid.prod()) // MERGE**2), 1)
    ids = tokenizer(text.replace("\0", "<|image_pad|>"))["input_ids"]
    return {**found, "input_ids": np.array(ids)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("new_settings", [False, True])
def test_tokens_pixels_and_positions_equal_transformers(
    copy: Path, sizes: list[tuple[int, int]], new_settings: bool
) -> None:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    if new_settings:
        path = copy / "preprocessor_config.json"
        raw = json.loads(path.read_text())
        size = {"shortest_edge": raw.pop("min_pixels"), "longest_edge": raw.pop("max_pixels")}
        path.write_text(json.dumps(raw | {"size": size}))
    images = [picture(*size) for size in sizes]
    prompt = f"{PROMPT} Größe: 19 mm?\n {{{{ x }}}}"
    ours, theirs = open_preparer(copy).prepare(images, prompt), library_inputs(copy, images, prompt)
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    if images:
        pixels = np.concatenate([feed["pixel_values"] for feed in ours.vision])
        assert np.array_equal(pixels, theirs["pixel_values"])
        kind = Qwen2VLForConditionalGeneration
        with torch.device("meta"):
            whole = kind(kind.config_class.from_pretrained(copy))
        ids = torch.from_numpy(theirs["input_ids"])[None]
        image = (ids == open_preparer(copy).image_token_id).int()
        found, _ = whole.model.get_rope_index(
            ids, image, torch.from_numpy(theirs["image_grid_thw"])
        )
        assert np.array_equal(ours.positions, found[:, 0].numpy())
    else:
        assert ours.vision == ()
        assert np.array_equal(ours.positions, np.tile(np.arange(len(ours.input_ids)), (3, 1)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_image_modes_equal_transformers(model: Path, mode: str) -> None:
    image = picture(40, 52, mode)
    ours = open_preparer(model).prepare([image], PROMPT)
    assert np.array_equal(
        ours.vision[0]["pixel_values"], library_inputs(model, [image], PROMPT)["pixel_values"]
    )


def test_sizes_equal_transformers(model: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    settings = open_preparer(model).settings
    random = np.random.default_rng(0)
    for _ in range(2000):
        factor = int(random.choice([8, 28]))
        height, width = (int(2 ** random.uniform(0, 12)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        image = Image.new("1", (width, height))
        theirs = smart_resize(height, width, factor, settings.smallest, settings.largest)
        assert target_size(image, factor, settings) == theirs


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (5, 3), (4, 9), (1, 7)])
def test_windows_hold_what_transformers_puts_together(grid: tuple[int, int]) -> None:
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    rows, columns = grid
    thw = torch.tensor([[1, rows * MERGE, columns * MERGE]])
    order, bounds = get_vision_window_index(thw, MERGE, 2 * MERGE * PATCH, PATCH)
    patches = (order[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten()
    theirs = {frozenset(patches[a:b].tolist()) for a, b in pairwise(bounds)}
    found = windows(rows, columns, 2, MERGE**2)
    table, lengths = found["window_patches"], found["window_lengths"]
    assert {frozenset(r[:n].tolist()) for r, n in zip(table, lengths, strict=True)} == theirs
    assert np.array_equal(table.reshape(-1)[found["patch_places"]], np.arange(len(patches)))
    ours = patch_positions(rows * MERGE, columns * MERGE, MERGE)
    assert np.array_equal(ours, get_vision_position_ids(thw, MERGE).numpy())


def test_both_forms_of_config_give_the_same_specs(tmp_path: Path) -> None:
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        found = []
        for old in (True, False):
            folder = write_tiny_qwen(tmp_path / f"{kind}{old}", kind, old=old)
            config = json.loads((folder / "config.json").read_text())
            found.append((decoder_spec(config), tower_spec(config)))
            assert ("text_config" in config) is not old
        assert found[0] == found[1]
        assert found[0][0].mrope == (2, 3, 3)
        assert found[0][0].tied


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_profiles_describe_the_real_class(name: str) -> None:
    """Names, shapes and the published number of parameters, from the profile's facts alone."""
    import torch
    import transformers

    profile = find_model(name)
    config: dict[str, Any] = {"model_type": profile.facts.model_type, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        place = config.setdefault(section, {}) if section else config
        place[leaf] = list(value) if isinstance(value, tuple) else value
    check_config(profile, config)
    kind = getattr(transformers, profile.facts.architecture)
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(config))
    specs = (decoder_spec(config), tower_spec(config))
    ours = {tensor.name: tensor.shape for spec in specs for tensor in spec.tensors()}
    assert ours == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(map(math.prod, ours.values())) == profile.facts.parameters
    newest = json.loads(model.config.to_json_string(use_diff=False))
    check_config(profile, newest)
    assert (decoder_spec(newest), tower_spec(newest)) == specs
    with pytest.raises(InputRefused, match="hidden_size is 1000"):
        check_config(profile, {**config, "hidden_size": 1000})


def test_defaults_are_those_of_the_config_classes() -> None:
    import transformers

    for kind in ("Qwen2VLConfig", "Qwen2_5_VLConfig"):
        config = getattr(transformers, kind)().to_dict()
        for key in config_defaults("qwen_vl"):
            section, _, leaf = key.rpartition(".")
            if section == "rope_scaling" or leaf in ("in_chans", "rope_theta"):
                continue  # published names of what the classes call otherwise
            place = config[section] if section else {**config["text_config"], **config}
            if leaf in place:
                given = config_value({"vision_config": {}}, key, "qwen_vl")
                assert (list(given) if isinstance(given, tuple) else given) == place[leaf], key


def test_the_published_settings_are_read_and_bounded(copy: Path) -> None:
    published = {"min_pixels": 3136, "max_pixels": 12845056}
    edit(copy / "preprocessor_config.json", **published)
    settings = open_preparer(copy).settings
    assert (settings.smallest, settings.largest) == (3136, 1280 * 28 * 28)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"image_token_id": 7}, "config.json says 7"),
        ("config.json", {"use_sliding_window": True}, "sliding attention"),
        ("config.json", {"rope_scaling": {"type": "yarn"}}, "rope_type is 'yarn'"),
        ("config.json", {"rope_scaling": {"mrope_section": [2, 3]}}, "mrope_section is"),
        ("config.json", {"rope_scaling": {"mrope_section": [2, 3, 4]}}, "with the sum 8"),
        (
            "config.json",
            {"hidden_size": 128, "rope_scaling": {"mrope_section": [4, 6, 6]}},
            "rows of 64",
        ),
        ("preprocessor_config.json", {"merge_size": 3}, "config.json's vision part has"),
        ("preprocessor_config.json", {"min_pixels": "x"}, "bad image settings"),
        ("preprocessor_config.json", {"min_pixels": 99999}, "bounds in order"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std holds 0"),
    ],
)
def test_bad_settings_are_refused(
    copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(InputRefused, match=message) as caught:
        open_preparer(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("marker", ["<|image_pad|>", "<|vision_start|>", "<|video_pad|>"])
def test_image_markers_in_the_prompt_are_refused(model: Path, marker: str) -> None:
    with pytest.raises(InputRefused, match="image marker"):
        open_preparer(model).prepare([picture(40, 40)], f"What is {marker}?")


def test_images_and_prompts_that_do_not_fit_are_refused(copy: Path) -> None:
    with pytest.raises(InputRefused, match="200 times as long as wide"):
        open_preparer(copy).prepare([picture(402, 2)], PROMPT)
    with pytest.raises(InputRefused, match="positions, the model has 1024"):
        open_preparer(copy).prepare([picture(40, 40)], "x9 " * 500)
    edit(copy / "preprocessor_config.json", do_resize=False)
    assert open_preparer(copy).prepare([picture(16, 24)], PROMPT).vision
    with pytest.raises(InputRefused, match="expected multiples of 8"):
        open_preparer(copy).prepare([picture(17, 24)], PROMPT)
    (copy / "chat_template.jinja").write_text("no image")
    with pytest.raises(InputRefused, match="0 image markers for 1 images"):
        open_preparer(copy).prepare([picture(16, 24)], PROMPT)


def test_positions_need_as_many_places_as_features() -> None:
    with pytest.raises(ValueError, match="image tokens"):
        positions(np.array([True, False]), [(1, 2)])


def test_a_feed_says_which_patches_form_a_row(model: Path) -> None:
    spec = tower_spec(json.loads((model / "config.json").read_text()))
    feed = vision_feed(spec, np.zeros((16, spec.patch_values), np.float32), 4, 4)
    assert feed["patch_positions"][:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
