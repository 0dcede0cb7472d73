"""What calibration tells a quantizer about the inputs of a decoder block's linear layers.

The calibration side walks the decoder block by block and calls a `BlockVisitor`; the quantizing side
is one. Neither imports the other: this file is all that they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InputStatistics:
    """Weighted statistics of the inputs ``x`` (width K) of linear layers that read the same values.

    second_moment: float32 ``[K, K]``, the weighted mean of ``x x^T`` over the calibration tokens;
    mean_abs: float32 ``[K]``, the weighted mean of ``|x|``; rows: float32 ``[R, K]``, some inputs
    drawn evenly over prompts and kinds of token; tokens: how many went into the means.
    """

    second_moment: NDArray[np.float32]
    mean_abs: NDArray[np.float32]
    rows: NDArray[np.float32]
    tokens: int


class BlockVisitor(Protocol):
    """Sees each decoder block once, in order, with the inputs as the blocks before it now give them."""

    def __call__(
        self,
        layer: int,
        weights: Mapping[str, NDArray[np.float32]],
        inputs: Mapping[str, InputStatistics],
    ) -> Mapping[str, NDArray[np.float32]]:
        """Quantize block `layer` and return the tensors to go on with.

        `weights` has every tensor of the block by its full name in the checkpoint (matrices
        ``[N, K]``, norms ``[H]``); `inputs` has the statistics by the name of each matrix (matrices
        that read the same values share one object). The result holds the tensors that changed, as
        float32 of the same shape: dequantized matrices, and norms into which scales were folded.
        """
        ...


class FloatModel(Protocol):
    """Evaluates the whole model with some weights replaced, for sensitivity measurements."""

    def kl(
        self,
        replaced: Mapping[str, NDArray[np.float32]],
        features: Sequence[NDArray[np.float32]] | None = None,
    ) -> float:
        """Mean KL(reference || replaced) in nats per caption token on the calibration prompts.

        `features`: by prompt the image features ``[image positions, H]``, when they are not the
        reference's own.
        """
        ...
