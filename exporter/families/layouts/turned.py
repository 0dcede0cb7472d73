"""Tensors that a published layout stores with their two axes exchanged, read the right way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint


class TurnedCheckpoint(Checkpoint):
    """A checkpoint some of whose matrices are read transposed, under other names.

    Its own inverse, with the names exchanged.
    """

    def __init__(self, stored: Checkpoint, names: Mapping[str, str]) -> None:
        """`names`: whole names of the matrices in `stored`, and their new ones. Those that it has not
        are left out. Raises `InputRefused` for one that is no matrix, or whose new name is taken.
        """
        super().__init__(())
        self.metadata, self.tensors = stored.metadata, dict(stored.tensors)
        self._stored, self._old = stored, {}
        for old, new in names.items():
            if old not in stored:
                continue
            info = self.tensors.pop(old)
            if len(info.shape) != 2 or new in self.tensors:
                raise InputRefused(
                    f"{info.file}: '{old}' is {list(info.shape)}; expected a matrix, and no '{new}' beside it"
                )
            self.tensors[new] = replace(info, name=new, shape=info.shape[::-1])
            self._old[new] = old

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored (`BF16` as uint16), the right way round."""
        self.info(name)
        old = self._old.get(name)
        if old is None:
            return self._stored.raw(name)
        return np.ascontiguousarray(self._stored.raw(old).T)

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors are of one type and shape and hold the same bytes."""
        if not self._old.keys() & {one, other}:
            return self._stored.same_bytes(one, other)
        a, b = self.info(one), self.info(other)
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and bool(np.array_equal(self.raw(one), self.raw(other)))
