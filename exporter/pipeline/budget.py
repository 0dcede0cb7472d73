"""What a mixed scheme may cost: bytes of weights, nats of KL, or both."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from exporter.core.errors import InputRefused, WrongUsage

SUFFIXES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Size:
    """A limit as it was asked for: `count` bytes, or that share of the float16 weights."""

    asked: str
    count: float
    share: bool

    def limit(self, float16_bytes: int) -> int:
        """Bytes."""
        return int(self.count * float16_bytes) if self.share else int(self.count)


@dataclass(frozen=True)
class Budget:
    """`size` bounds the bytes of all weights, `kl` the measured mean KL in nats per token.

    With neither a mixed model may have the bytes of the scheme's own formats (uniform int4). With
    `kl` alone it is made as small as that allows; with a size as close to the reference as it
    allows.
    """

    size: Size | None = None
    kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For cache keys and records."""
        return {"max_size": self.size.asked if self.size else None, "max_kl": self.kl}

    def limit(self, float16_bytes: int, uniform_bytes: int, least_bytes: int) -> int | None:
        """Bytes of weights at most; None when only the KL is bounded.

        Raises `InputRefused` when not even `least_bytes`, the smallest choice, fits.
        """
        if self.size is None:
            return None if self.kl is not None else uniform_bytes
        found = self.size.limit(float16_bytes)
        if found < least_bytes:
            raise InputRefused(
                f"--max-size {self.size.asked} is {found / 1e6:.2f} MB of weights; with every unit in "
                f"its fewest bits they take {least_bytes / 1e6:.2f} MB "
                f"({math.ceil(1e4 * least_bytes / float16_bytes) / 1e4} of float16); allow at least that"
            )
        return found


def read_budget(max_size: str | None, max_kl: float | None, *, mixed: bool) -> Budget:
    """The budget that the command line asks for.

    `max_size`: bytes with an optional suffix (300MB, 280MiB), or a share of the float16 weights
    between 0 and 1 (0.3). `mixed`: whether a scheme that has one is built. Raises `WrongUsage`.
    """
    if not mixed and (max_size is not None or max_kl is not None):
        raise WrongUsage(
            "--max-size and --max-kl are for --scheme mixed; other schemes fix the bits"
        )
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise WrongUsage(f"--max-kl {max_kl}: expected nats above 0, such as 0.01")
    return Budget(None if max_size is None else parse_size(max_size), max_kl)


def parse_size(text: str) -> Size:
    """Bytes or a share from what `read_budget` describes. Raises `WrongUsage`."""
    found = SIZE.fullmatch(text.strip())
    scale = SUFFIXES.get(found.group(2).upper()) if found else None
    if not found or scale is None:
        raise WrongUsage(
            f"--max-size '{text}': expected bytes such as 300MB, 280MiB or 300000000, or a share of "
            "the float16 weights such as 0.3"
        )
    number = float(found.group(1))
    share = not found.group(2) and 0 < number <= 1
    if not share and number * scale < 2:
        raise WrongUsage(f"--max-size '{text}' is no size; expected bytes or a share above 0")
    return Size(text.strip(), number if share else number * scale, share)
