"""Tiles must be bit-identical to transformers' image processors, for every kind of image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.tiling import read_settings, split_image

TILE32 = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def reference(name: str, image: Image.Image, raw: dict[str, Any]) -> tuple[Any, int, int]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    kind = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[name]
    out = kind(**raw)([[image]], return_row_col_info=True, return_tensors="np")
    return out["pixel_values"][0], out["rows"][0][0], out["cols"][0][0]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode=mode)


def assert_same(image: Image.Image, raw: dict[str, Any], name: str = "idefics3") -> None:
    pixels, rows, cols = reference(name, image, raw)
    ours = split_image(image, read_settings(raw, "test"))
    assert (ours.rows, ours.cols) == (rows, cols)
    assert ours.pixel_values.dtype == np.float32
    assert ours.pixel_values.shape == pixels.shape
    assert np.array_equal(ours.pixel_values, pixels)


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    longest=st.sampled_from([20, 32, 33, 64, 90, 128]),
    tile=st.sampled_from([16, 32, 48]),
    split=st.booleans(),
    resize=st.booleans(),
    name=st.sampled_from(["idefics3", "smolvlm"]),
)
@example(1, 1, 64, 32, True, True, "idefics3")
@example(1, 300, 64, 32, True, True, "idefics3")
@example(300, 1, 64, 32, False, True, "smolvlm")
@example(33, 32, 64, 32, True, False, "idefics3")
def test_every_size_equals_transformers(
    width: int, height: int, longest: int, tile: int, split: bool, resize: bool, name: str
) -> None:
    raw = {
        "size": {"longest_edge": longest},
        "max_image_size": {"longest_edge": tile},
        "do_image_splitting": split,
        "do_resize": resize,
    }
    assert_same(noise(width, height, seed=width * 1000 + height), raw, name)


@pytest.mark.parametrize(
    ("size", "longest"),
    [
        ((700, 400), 2048),
        ((37, 5000), 2048),
        ((512, 512), 512),
        ((513, 511), 512),
        ((4100, 3), 4608),
    ],
)
def test_published_sizes(size: tuple[int, int], longest: int) -> None:
    raw = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": 512}}
    assert_same(noise(*size), raw)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_modes(mode: str) -> None:
    assert_same(noise(70, 45, mode), TILE32)


def test_palette_with_and_without_transparency() -> None:
    palette = noise(50, 40).convert("P", palette=Image.Palette.ADAPTIVE)
    assert_same(palette, TILE32)
    palette.info["transparency"] = 3
    assert_same(palette, TILE32)


def test_one_bit_and_sixteen_bit() -> None:
    assert_same(noise(50, 40, "L").convert("1"), TILE32)
    deep = np.random.default_rng(1).integers(0, 65536, (40, 50), dtype=np.uint16)
    assert_same(Image.fromarray(deep), TILE32)


@pytest.mark.parametrize(
    "raw",
    [
        {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.22, 0.23, 0.3]},
        {"do_normalize": False},
        {"resample": 2},
        {"resample": 3, "rescale_factor": 0.01},
        {"size": {"height": 40, "width": 90}},
        {"do_rescale": False},
    ],
)
def test_settings(raw: dict[str, Any]) -> None:
    assert_same(noise(70, 45), TILE32 | raw)


def test_defaults_are_those_of_transformers() -> None:
    assert_same(noise(90, 60), {})


def test_tiles_that_are_exactly_zero_are_kept() -> None:
    # torch's model takes such a tile for padding, drops it, and fails on the number of tokens.
    raw = TILE32 | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    tiles = split_image(Image.new("RGB", (64, 64)), read_settings(raw, "test"))
    assert tiles.pixel_values.shape == (5, 3, 32, 32)
    assert not tiles.pixel_values.any()


def test_mid_gray_is_never_zero_with_the_published_mean() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    raw = {"do_resize": False, "max_image_size": {"longest_edge": 256}}
    assert split_image(levels, read_settings(raw, "test")).pixel_values.all()


@pytest.mark.parametrize(
    "raw",
    [
        {"size": {}},
        {"size": 5},
        {"size": {"longest_edge": -1}},
        {"size": {"longest_edge": 10**9}},
        {"max_image_size": {"longest_edge": "32"}},
        {"resample": 17},
        {"image_std": [0, 1, 1]},
        {"image_mean": [0.5]},
        {"image_mean": "abc"},
    ],
)
def test_bad_settings_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="preprocessor"):
        read_settings(raw, "preprocessor_config.json")


def test_unresized_strip_that_would_need_too_many_tiles_is_refused() -> None:
    raw = {"do_resize": False, "max_image_size": {"longest_edge": 512}}
    with pytest.raises(InputRefused, match="scale it down"):
        split_image(Image.new("L", (200_000, 1)), read_settings(raw, "test"))
