"""CheXzero's images against Pillow's and torch's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.chest import (
    CHEST_IMAGES,
    ChestSettings,
    chest_pixels,
    cubic_weights,
    read_chest_settings,
)

torch.set_num_threads(1)
SETTINGS = read_chest_settings(CHEST_IMAGES, "here")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@settings(max_examples=60, deadline=None)
@given(before=st.integers(1, 70), after=st.integers(1, 70))
def test_the_cubic_is_torchs(before: int, after: int) -> None:
    values = np.random.default_rng(before * 100 + after).normal(size=(before, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values.T[None, None].copy()), (5, after), mode="bicubic"
    )[0, 0].numpy()
    # The other axis keeps its size, where a cubic changes nothing.
    assert np.abs(values.T @ cubic_weights(before, after).T - expected).max() < 1e-5
    assert np.allclose(cubic_weights(before, after).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("side", [224, 320])
@pytest.mark.parametrize(
    ("size", "mode"), [((320, 320), "L"), ((400, 250), "RGB"), ((9, 64), "RGBA")]
)
def test_pixels_are_normalised_before_they_are_resized(
    size: tuple[int, int], mode: str, side: int
) -> None:
    image = picture(*size, mode)
    scale = 320 / max(size)
    width, height = int(size[0] * scale), int(size[1] * scale)
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (320, 320))
    canvas.paste(small, ((320 - width) // 2, (320 - height) // 2))
    levels = torch.from_numpy(np.array(canvas, np.float32))
    normal = ((levels - 101.48761) / 83.43944).expand(1, 3, 320, 320)
    expected = torch.nn.functional.interpolate(normal, (side, side), mode="bicubic")[0].numpy()
    found = chest_pixels(image, SETTINGS, side)
    assert found.dtype == np.float32
    assert found.shape == (3, side, side)
    assert np.abs(found - expected).max() < 1e-5
    # Black borders, as the original has them, are far from the mean.
    assert found.min() < -1


def test_the_square_is_padded_in_the_middle() -> None:
    pixels = chest_pixels(Image.new("L", (64, 16), 255), ChestSettings(64, 0.0, 1.0), 64)
    assert pixels[0, :24].max() == pixels[0, 40:].max() == 0
    assert pixels[0, 24:40].min() == 255


@pytest.mark.parametrize(
    "change",
    [
        {"image_std": 0},
        {"image_std": "nan"},
        {"image_mean": [101.0] * 3},
        {"image_mean": None},
        {"square": 0},
        {"square": 1e3},
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="there: bad image settings") as caught:
        read_chest_settings({**CHEST_IMAGES, **change}, "there")
    assert "\n" not in str(caught.value)
