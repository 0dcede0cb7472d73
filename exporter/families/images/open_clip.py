"""Images of open_clip with Pillow and numpy: no torch, no torchvision.

Computes what open_clip's ``image_transform`` computes with torchvision's transforms on a Pillow
image: the shortest edge resized, a crop from the middle, normalisation. The crop begins where
torchvision rounds to, which transformers' CLIP processor does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.clip import MAX_PIXELS, MEAN, STD
from exporter.families.images.pixels import Normalisation, read_normalisation, resized

PROCESSOR = "OpenClipImageProcessor"


@dataclass(frozen=True)
class OpenClipImages:
    """Edge of the square in pixels, and how its values are normalised."""

    side: int
    normalisation: Normalisation

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """Pixel values ``[3, side, side]`` of an image of any Pillow mode.

        Raises `InputRefused` for an image so long and thin that resizing its short edge explodes it.
        """
        picture, side = image.convert("RGB"), self.side
        short, long = sorted(picture.size)
        longer = int(side * long / short)
        if side * longer > MAX_PIXELS:
            raise InputRefused(
                f"image of {image.width} x {image.height} pixels would become {side} x {longer}; expected "
                f"at most {MAX_PIXELS} pixels, crop it"
            )
        height, width = (longer, side) if picture.width <= picture.height else (side, longer)
        if picture.size != (width, height):
            picture = resized(picture, height, width, Image.Resampling.BICUBIC)
        # round() takes a half to the even number, as torchvision's does.
        left, top = round((width - side) / 2), round((height - side) / 2)
        picture = picture.crop((left, top, left + side, top + side))
        values: NDArray[np.float32] = self.normalisation.apply([picture])[0]
        return values


def read_open_clip_images(raw: Mapping[str, Any], where: str, side: int) -> OpenClipImages:
    """Settings from a parsed preprocessor_config.json for a tower of `side` pixels.

    Raises `InputRefused` naming `where` on wrong types and on settings of another kind of processor.
    """
    try:
        if raw.get("image_processor_type") != PROCESSOR:
            raise ValueError(f"image_processor_type is {raw.get('image_processor_type')!r}")
        return OpenClipImages(side, read_normalisation(raw, MEAN, STD))
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected those that merging "
            f"an open_clip checkpoint writes ({PROCESSOR})"
        ) from error
