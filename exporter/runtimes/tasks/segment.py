"""Masks for texts on an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.tasks import (
    MASK_GRAPH,
    TEXT_GRAPH,
    VISION_GRAPH,
    Outputs,
    SegmentationPreparer,
)
from exporter.runtimes.graphs import Graphs

Masks = NDArray[np.float32]


class Segmenter:
    """Masks with the graphs of one model. Not safe for use by several threads."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._preparer: SegmentationPreparer = graphs.preparer
        self._texts: tuple[tuple[str, ...], Outputs] | None = None

    def masks(self, image: Image.Image, labels: Sequence[str]) -> Masks:
        """Probabilities ``[labels, height, width]`` at the model's own resolution.

        Each label is asked for by itself: a pixel's probabilities do not add up to 1. Raises
        `InputRefused` without labels.
        """
        logits = self.logits(image, labels)
        # The same as 1 / (1 + exp(-x)), without its overflow.
        probabilities: Masks = 0.5 * (1 + np.tanh(0.5 * logits))
        return probabilities

    def segment(self, image: Image.Image, labels: Sequence[str]) -> Masks:
        """`masks` at the image's own size, ``[labels, height, width]``."""
        return np.stack([resized(mask, image.size) for mask in self.masks(image, labels)])

    def logits(self, image: Image.Image, labels: Sequence[str]) -> Masks:
        """The same before the sigmoid."""
        if not labels:
            raise InputRefused("no label was given; expected at least one text to segment by")
        seen = self._graphs.run(VISION_GRAPH, self._preparer.images([image]))
        return self._graphs.run(MASK_GRAPH, {**seen, **self._encoded(tuple(labels))})["logits"]

    def _encoded(self, labels: tuple[str, ...]) -> Outputs:
        """What the text graph gives for the labels, kept: sets of images are asked for the same ones."""
        if self._texts is None or self._texts[0] != labels:
            self._texts = (labels, self._graphs.run(TEXT_GRAPH, self._preparer.texts(labels)))
        return self._texts[1]


def resized(mask: Masks, size: tuple[int, int]) -> Masks:
    """A mask ``[height, width]`` at an image's `size` (width, height), bilinear."""
    frame = Image.fromarray(np.ascontiguousarray(mask)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(frame, np.float32)
