"""What can go wrong inside a quantized matrix, counted for each layer's row in quantization.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import PackedMatrix
from exporter.core.errors import MedexportError

# A channel counts as an outlier beyond this many times the median of all.
OUTLIER = 10.0


@dataclass(frozen=True)
class Guards:
    """Blocks whose scale is 0 (all weights 0), and channels far larger than the others.

    A channel's size is the root mean square of its inputs where calibration saw them, else of its
    weights (`of`); `outliers` of them exceed `OUTLIER` times the median, `worst` is the largest ratio.
    """

    zero_blocks: int
    of: Literal["inputs", "weights"]
    outliers: int
    worst: float

    def document(self) -> dict[str, Any]:
        """Keys of the layer's row."""
        return {
            "zero_blocks": self.zero_blocks,
            "outliers": {"of": self.of, "channels": self.outliers, "worst": self.worst},
        }


def guard(
    packed: PackedMatrix,
    squares: NDArray[Any],
    *,
    of: Literal["inputs", "weights"],
    name: str,
) -> Guards:
    """Look a matrix over; `squares` ``[K]`` is each channel's mean (or summed) square.

    Raises `MedexportError` naming `name` when a scale is NaN, infinite, or negative where the
    format has zero points or wants positive scales (another symmetric block may be mirrored).
    """
    scales, form = packed.scales, packed.format
    right = np.isfinite(scales) & ((scales >= 0) | (form.symmetric and not form.positive))
    bad = int(np.count_nonzero(~right))
    if bad:
        raise MedexportError(
            f"tensor '{name}': {bad} of {scales.size} block scales are NaN, infinite or negative; "
            "this is a fault of the quantizer, quantize with another scheme and report it"
        )
    sizes = np.sqrt(squares.astype("f8"))
    middle = float(np.median(sizes))
    ratios = sizes / middle if middle else np.zeros_like(sizes)
    return Guards(
        int(np.count_nonzero(scales == 0)),
        of,
        int(np.count_nonzero(ratios > OUTLIER)),
        round(float(ratios.max(initial=0.0)), 3),
    )
