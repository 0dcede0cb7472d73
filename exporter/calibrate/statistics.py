"""Statistics of a linear layer's inputs, accumulated prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.activations import InputStatistics

if TYPE_CHECKING:
    import torch

# Second moments up to this width are summed in float64. Above it float64 would take 1 GB for a
# LLaMA-7B's MLP; summing a few hundred prompts in float32 errs by at most 1e-5 of the sum.
DOUBLE_WIDTH = 2048
ROWS = 512


def token_weights(prompts: Sequence[EmbeddedPrompt], *, balance: bool) -> list[NDArray[np.float32]]:
    """A weight for each token of each prompt; together they are the number of tokens.

    With `balance`, image tokens and text tokens have equal sums: an image gives ten times as many
    tokens as its caption, and unweighted second moments then follow the image alone (MBQ, Li et al.
    2024, arXiv 2412.19509).
    """
    image = sum(int(p.image_positions.sum()) for p in prompts)
    total = sum(p.length for p in prompts)
    text = total - image
    if not balance or not image or not text:
        return [np.ones(p.length, np.float32) for p in prompts]
    one, other = np.float32(total / 2 / image), np.float32(total / 2 / text)
    return [np.where(p.image_positions, one, other).astype(np.float32) for p in prompts]


def sampled_rows(prompts: Sequence[EmbeddedPrompt], rows: int = ROWS) -> list[NDArray[np.int64]]:
    """Positions per prompt whose inputs are kept: evenly over prompts, image and text alike."""
    share = -(-rows // (2 * max(1, len(prompts))))
    kept = []
    for prompt in prompts:
        kinds = (prompt.image_positions, ~prompt.image_positions)
        kept.append(np.sort(np.concatenate([_evenly(np.flatnonzero(k), share) for k in kinds])))
    return kept


def _evenly(places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if len(places) <= count:
        return places
    return places[np.arange(count) * len(places) // count]


class Accumulator:
    """Sums over the inputs ``[S, K]`` of one group of matrices."""

    def __init__(self, width: int) -> None:
        import torch

        kind = torch.float64 if width <= DOUBLE_WIDTH else torch.float32
        self._moment = torch.zeros((width, width), dtype=kind)
        self._absolute = torch.zeros(width, dtype=torch.float64)
        self._weight, self._tokens = 0.0, 0
        self._rows: list[NDArray[np.float32]] = []

    def add(self, x: torch.Tensor, weights: torch.Tensor, rows: NDArray[np.int64]) -> None:
        """Add inputs with one weight each; those at `rows` are kept. Raises ValueError on NaN."""
        import torch

        absolute = (weights @ x.abs()).double()
        if not bool(torch.isfinite(absolute).all()):
            raise ValueError("inputs are not finite")
        self._absolute += absolute
        scaled = x * weights.sqrt()[:, None]
        if self._moment.dtype == torch.float64:
            self._moment += scaled.T @ scaled
        else:
            self._moment.addmm_(scaled.T, scaled)
        self._weight += float(weights.double().sum())
        self._tokens += x.shape[0]
        self._rows.append(x[torch.from_numpy(rows)].numpy())

    def result(self) -> InputStatistics:
        """The weighted means. Raises ValueError when nothing was added. Ends the accumulation."""
        import torch

        if not self._tokens:
            raise ValueError("no inputs were added")
        moment = self._moment.div_(self._weight).to(torch.float32)
        return InputStatistics(
            second_moment=moment.numpy(),
            mean_abs=(self._absolute / self._weight).float().numpy(),
            rows=np.concatenate(self._rows),
            tokens=self._tokens,
        )
