"""Random numbers that stay the same for ever.

The methods of numpy's ``Generator`` may change between numpy versions; the raw output of a bit
generator may not (NEP 19). Everything the phantoms draw is therefore made from PCG64's raw words.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Stream:
    """A reproducible stream of random choices, seeded by a text key.

    Two streams with different keys are independent; the same key gives the same choices on every
    machine and with every numpy version.
    """

    def __init__(self, key: str) -> None:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        self._bits = np.random.PCG64(seed)

    def unit(self) -> float:
        """A float in [0, 1) with 53 random bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        """True with the given probability (0 to 1)."""
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely; raises ``IndexError`` if there are none."""
        return options[int(self.unit() * len(options))]

    def grain(self, height: int, width: int) -> NDArray[np.float64]:
        """Noise of shape [height, width], bell-shaped in [-1, 1], standard deviation about 0.29."""
        words = np.asarray(self._bits.random_raw((height * width + 1) // 2), dtype="<u8")
        quads = words.view(np.uint8).reshape(-1, 4).astype(np.float64).sum(axis=1)
        grain: NDArray[np.float64] = (
            quads[: height * width].reshape(height, width) - 510.0
        ) / 510.0
        return grain
