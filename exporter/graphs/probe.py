"""Sources of weights for vision graphs that show what happens inside: see `graphs.static`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.static8 import StaticMatrix
from exporter.graphs.matrices import GatedMatrix, Matrix, WatchedMatrix
from exporter.graphs.weights import WeightSource


class WatchingSource(WeightSource):
    """The tensors of a float folder, with the matrices `names` watched."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        super().__init__(folder, "float16")
        self._watched = names

    def matrix(
        self, name: str, rows: int, columns: int, *, again: bool = False, turned: bool = False
    ) -> Matrix:
        """See `WeightSource`."""
        values = super().matrix(name, rows, columns, again=again, turned=turned)
        if name in self._watched and isinstance(values, np.ndarray):
            return WatchedMatrix((name,), values)
        return values


class GatedSource(WeightSource):
    """The tensors of a float folder, some of them `changed`, those in `static` gated."""

    def __init__(
        self,
        folder: Path,
        changed: Mapping[str, NDArray[np.float32]],
        static: Mapping[str, StaticMatrix],
    ) -> None:
        super().__init__(folder, "float32")
        self._changed, self._gated = changed, static

    def matrix(
        self, name: str, rows: int, columns: int, *, again: bool = False, turned: bool = False
    ) -> Matrix:
        """See `WeightSource`."""
        values = super().matrix(name, rows, columns, again=again, turned=turned)
        values = self._changed.get(name, values) if isinstance(values, np.ndarray) else values
        if name in self._gated and isinstance(values, np.ndarray):
            return GatedMatrix((name,), values, self._gated[name])
        return values

    def vector(self, name: str, size: int, *, again: bool = False) -> NDArray[np.float32]:
        """See `WeightSource`."""
        values = super().vector(name, size, again=again)
        return self._changed.get(name, values)
