"""Inputs as a decoder's layers see them: correlated, heavy-tailed, some channels far larger."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics


def inputs(columns: int, rows: int, seed: int = 0) -> NDArray[np.float32]:
    """``[rows, columns]`` of the distribution that `seed` stands for; more rows begin with the same."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) * np.arange(1, columns + 1) ** -0.7
    gains = np.exp(rng.normal(0, 0.5, columns))
    gains[rng.integers(0, columns, 2)] *= 8
    x = rng.standard_normal((rows, columns)) @ mix.T * gains
    return (x / np.sqrt(np.mean((mix.T * gains) ** 2) * columns)).astype(np.float32)


def statistics(x: NDArray[np.float32]) -> InputStatistics:
    moment = (x.T.astype("f8") @ x.astype("f8") / x.shape[0]).astype(np.float32)
    return InputStatistics(moment, np.abs(x).mean(axis=0), x[:256].copy(), x.shape[0])


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed + 100)
    return (0.02 * rng.standard_t(5, (rows, columns))).astype(np.float32)


def lost(w: NDArray[np.float32], q: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    """Squared error of the outputs relative to the outputs, in float64, from the inputs themselves."""
    change = x.astype("f8") @ (q.astype("f8") - w.astype("f8")).T
    return float(np.square(change).sum() / np.square(x.astype("f8") @ w.T.astype("f8")).sum())
