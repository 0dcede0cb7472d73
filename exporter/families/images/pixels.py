"""What the image settings of all families share: sizes, and pixels to normalised values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_EDGE = 8192


@dataclass(frozen=True)
class Normalisation:
    """``(pixel * rescale_factor - mean) / std`` per channel; None leaves the step out."""

    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def apply(self, frames: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Float32 ``[frames, 3, height, width]`` of RGB frames of one size, as transformers rounds."""
        # There are 256 values per channel: looking them up gives the same bits as computing each pixel.
        levels = np.arange(256, dtype=np.float64)
        scale = 1.0 if self.rescale_factor is None else self.rescale_factor
        table = np.repeat((levels * scale).astype(np.float32)[None], 3, axis=0)
        if self.mean is not None and self.std is not None:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            table = (table - mean[:, None]) / std[:, None]
        out = np.empty((len(frames), 3, frames[0].height, frames[0].width), np.float32)
        for target, frame in zip(out, frames, strict=True):
            pixels = np.asarray(frame)
            for channel in range(3):
                np.take(table[channel], pixels[..., channel], out=target[channel])
        return out


def read_normalisation(raw: Mapping[str, Any], mean: Any, std: Any) -> Normalisation:
    """The keys of a preprocessor_config.json; `mean` and `std` are the defaults of its class.

    Raises ValueError or TypeError on values of other types, and on a standard deviation of 0.
    """
    normalize = raw.get("do_normalize", True)
    found = Normalisation(
        float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else None,
        _triple(raw.get("image_mean", mean)) if normalize else None,
        _triple(raw.get("image_std", std)) if normalize else None,
    )
    if found.std is not None and 0.0 in found.std:
        raise ValueError("image_std holds 0; expected positive numbers")
    return found


def edge(value: Any) -> int:
    """An edge in pixels. Raises ValueError when no image could have it."""
    if type(value) is not int or not 1 <= value <= MAX_EDGE:
        raise ValueError(f"edge {value!r}; expected 1 to {MAX_EDGE} pixels")
    return value


def resized(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """The image at that size with Pillow's filter `resample`."""
    return image.resize((width, height), resample=Image.Resampling(resample))


def _triple(value: Any) -> tuple[float, float, float]:
    red, green, blue = [value] * 3 if isinstance(value, (int, float)) else value
    return float(red), float(green), float(blue)
