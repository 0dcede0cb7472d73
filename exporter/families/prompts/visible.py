"""Which images each token of a growing text sees, where the decoder asks for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class VisibleImages:
    """Rows of an image mask as a text grows: the prompt's own, then its last one for each token."""

    def __init__(self, prompt: NDArray[np.int64] | None) -> None:
        """`prompt`: int64 ``[length, images]``; None where the decoder takes no such mask."""
        self._prompt = prompt
        self._given = 0

    def take(self, length: int) -> NDArray[np.int64] | None:
        """The next `length` rows, int64 ``[length, images]``; None without a mask."""
        if self._prompt is None:
            return None
        places = np.arange(self._given, self._given + length)
        self._given += length
        rows: NDArray[np.int64] = self._prompt[np.minimum(places, len(self._prompt) - 1)]
        return rows
