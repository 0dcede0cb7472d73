"""What prepares images and texts for a model that matches them, where its texts are BERT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.families.base import Feed
from exporter.families.prompts.bert import BertTexts

Pixels = Callable[[Image], NDArray[np.float32]]


@dataclass(frozen=True)
class BertMatchingPreparer:
    """`families.tasks.ZeroShotPreparer`: `pixels` gives ``[3, side, side]`` of an image of any mode."""

    template: str
    pixels: Pixels
    tokenizer: BertTexts

    def images(self, images: Sequence[Image]) -> Feed:
        """pixel_values float32 ``[images, 3, side, side]``."""
        return {"pixel_values": np.stack([self.pixels(image) for image in images])}

    def texts(self, texts: Sequence[str]) -> Feed:
        """input_ids and attention_mask int64 ``[texts, length]``, padded to the longest; longer texts
        than the model was trained with are cut. Raises `InputRefused` for no text.
        """
        return self.tokenizer.texts(texts)
