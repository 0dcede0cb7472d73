"""CLIP's and LLaVA's images against the image processors of transformers, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from exporter.core.errors import InputRefused
from exporter.families.images.anyres import (
    GRID,
    feature_index,
    read_anyres_settings,
    split_anyres,
)
from exporter.families.images.clip import clip_pixels, read_clip_settings

torch.set_num_threads(1)
SIZES = [(64, 64), (100, 37), (37, 100), (30, 20), (224, 225), (17, 400), (336, 336), (1, 50)]
PUBLISHED: dict[str, Any] = {
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
GRID_56 = [[h // 6, w // 6] for h, w in GRID]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"size": {"height": 40, "width": 72}, "crop_size": 56},
        {"size": 40},
        {"crop_size": {"height": 31, "width": 57}, "resample": 2, "do_rescale": False},
        {"do_center_crop": False, "size": {"height": 56, "width": 56}, "do_normalize": False},
        {"do_resize": False, "image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_pixels_equal_transformers(size: tuple[int, int], changed: dict[str, Any]) -> None:
    raw = {**PUBLISHED, **changed}
    image = picture(*size)
    expected = CLIPImageProcessorPil(**raw)(image, return_tensors="np")["pixel_values"][0]
    found = clip_pixels(image, read_clip_settings(raw, "here"))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(70, 50, mode)
    expected = CLIPImageProcessorPil(**PUBLISHED)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(clip_pixels(image, read_clip_settings(PUBLISHED, "")), expected)


@pytest.mark.parametrize("size", SIZES)
def test_padding_to_a_square_equals_transformers(size: tuple[int, int]) -> None:
    raw = {**PUBLISHED, "do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    image = picture(*size)
    expected = LlavaImageProcessorPil(**raw)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(clip_pixels(image, read_clip_settings(raw, "")), expected)


def test_clips_own_do_pad_changes_nothing() -> None:
    raw = {**PUBLISHED, "do_pad": True, "image_processor_type": "CLIPImageProcessor"}
    assert not read_clip_settings(raw, "").square


@pytest.mark.parametrize(
    "raw",
    [
        {"size": {"shortest_edge": 0}},
        {"size": {"longest_edge": 500, "shortest_edge": 50}},
        {"size": "336"},
        {"crop_size": {"height": 336}},
        {"image_std": 0.0},
        {"image_mean": [0.5, 0.5]},
        {"resample": 9},
    ],
)
def test_bad_settings_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match=r"here\.json: bad image settings"):
        read_clip_settings(raw, "here.json")


def test_a_strip_that_would_explode_is_refused() -> None:
    with pytest.raises(InputRefused, match="1 x 30000 pixels would become 56 x 1680000"):
        clip_pixels(Image.new("RGB", (1, 30000)), read_clip_settings(PUBLISHED, ""))


def anyres(grid: list[list[int]]) -> dict[str, Any]:
    return {**PUBLISHED, "image_grid_pinpoints": grid}


@pytest.mark.parametrize("size", [*SIZES, (112, 112), (113, 56), (300, 100), (2000, 3), (3, 2000)])
def test_tiles_equal_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    raw = anyres([*GRID_56, [224, 224]])
    processor = LlavaNextImageProcessorPil(**raw)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    found = split_anyres(image, read_anyres_settings(raw, ""))
    assert np.array_equal(found, expected)


def packer(grid: list[list[int]], tile: int, patch: int) -> LlavaNextModel:
    """The model without weights: `pack_image_features` reads only its config."""
    sizes = {"image_size": tile, "patch_size": patch}
    config = LlavaNextConfig(image_grid_pinpoints=grid, vision_config=sizes)
    model = LlavaNextModel.__new__(LlavaNextModel)
    torch.nn.Module.__init__(model)
    model.config = config
    return model


PACKER = packer([list(g) for g in GRID], 336, 14)
SMALL = packer(anyres([*GRID_56, [224, 224]])["image_grid_pinpoints"], 56, 14)


def check_packing(model: LlavaNextModel, tile: int, patches: int, size: tuple[int, int]) -> int:
    grid = [tuple(g) for g in model.config.image_grid_pinpoints]
    tiles, index = feature_index(size, grid, tile, patches)
    rows = torch.arange(tiles * patches**2 + 1, dtype=torch.float64)
    packed, _ = model.pack_image_features(
        [rows[:-1].reshape(tiles, -1, 1)],
        torch.tensor([size]),
        vision_feature_select_strategy="default",
        image_newline=rows[-1:],
    )
    assert np.array_equal(packed[0][:, 0].numpy(), index)
    return tiles


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_packing_equals_transformers(height: int, width: int) -> None:
    check_packing(PACKER, 336, 24, (height, width))


@pytest.mark.parametrize(
    ("size", "tiles"), [((56, 110), 3), ((112, 112), 5), ((168, 56), 4), ((900, 900), 17)]
)
def test_packing_of_each_number_of_tiles(size: tuple[int, int], tiles: int) -> None:
    assert check_packing(SMALL, 56, 4, size) == tiles


def test_rows_of_the_recorded_image() -> None:
    # 2928 rows for 560 x 560 pixels are what a public serving script of this model gives.
    assert len(feature_index((560, 560), GRID, 336, 24)[1]) == 2928


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"image_grid_pinpoints": [[56, 100]]}, "multiples of 56"),
        ({"image_grid_pinpoints": [[56 * 9, 56 * 9]]}, "at most 64 tiles"),
        ({"image_grid_pinpoints": []}, "multiples of 56"),
        ({"image_grid_pinpoints": [56]}, "pairs of pixels"),
        ({"crop_size": {"height": 56, "width": 28}}, "square"),
        ({"size": {"shortest_edge": 28}}, "the tile's own"),
    ],
)
def test_bad_grids_are_refused(changed: dict[str, Any], word: str) -> None:
    with pytest.raises(InputRefused, match=word):
        read_anyres_settings({**anyres(GRID_56), **changed}, "here")
