"""Tensors that a published layout stores in parts: joined when read, taken apart again for the way back.

A part is some rows of the whole. A part that is zero in every checkpoint of the layout need not be
stored: the keys of EVA's attention have no bias, where the newest class has one of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.header import TensorInfo
from exporter.core.tensors import Checkpoint


@dataclass(frozen=True)
class Joined:
    """The tensors whose names end in `whole` are published as `parts`, one behind the other.

    `parts`: the endings that stand in the place of `whole`, None for zeros that are not stored. All
    parts have one shape.
    """

    whole: str
    parts: tuple[str | None, ...]

    @property
    def first(self) -> str:
        """The first stored part's ending."""
        return next(part for part in self.parts if part is not None)


class JoinedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are read from several places."""

    def __init__(self, stored: Checkpoint, joins: Sequence[Joined]) -> None:
        """`stored` with the wholes of `joins` in place of their parts.

        Raises `InputRefused` when a part is missing, or is of another shape or type than the first.
        """
        super().__init__(())
        self.metadata, self.tensors = stored.metadata, dict(stored.tensors)
        self._stored = stored
        self._parts: dict[str, tuple[str | None, ...]] = {}
        for join in joins:
            for name in stored.tensors:
                if name.endswith(join.first):
                    self._join(name.removesuffix(join.first), join)

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored (`BF16` as uint16), its parts behind each other."""
        parts = self._parts.get(name)
        if parts is None:
            return self._stored.raw(name)
        first = self._stored.raw(next(part for part in parts if part is not None))
        # Zero is all bits zero in every type of the format.
        found = [np.zeros_like(first) if p is None else self._stored.raw(p) for p in parts]
        return np.concatenate(found)

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors are of one type and shape and hold the same bytes."""
        if not self._parts.keys() & {one, other}:
            return self._stored.same_bytes(one, other)
        a, b = self.info(one), self.info(other)
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and bool(np.array_equal(self.raw(one), self.raw(other)))

    def _join(self, stem: str, join: Joined) -> None:
        names = tuple(None if part is None else stem + part for part in join.parts)
        whole, first = stem + join.whole, self.info(stem + join.first)
        for part in filter(None, names):
            found = self.info(part)
            equal = (found.dtype, found.shape) == (first.dtype, first.shape)
            if not equal or not first.shape or whole in self._stored:
                raise InputRefused(
                    f"{found.file}: '{part}' is {found.dtype} {list(found.shape)}, '{first.name}' "
                    f"{first.dtype} {list(first.shape)}; expected equal parts and no '{whole}' beside them"
                )
        for part in filter(None, names):
            del self.tensors[part]
        shape = (len(names) * first.shape[0], *first.shape[1:])
        size = len(names) * first.nbytes
        self.tensors[whole] = TensorInfo(whole, first.dtype, shape, first.file, 0, size)
        self._parts[whole] = names


def parted(checkpoint: Checkpoint, joins: Sequence[Joined]) -> Checkpoint:
    """`checkpoint` with the parts of `joins` in place of their wholes: the inverse of joining.

    Raises `InputRefused` when a whole cannot be cut evenly, or is not zero where no part is stored.
    """
    found = Checkpoint(())
    found.metadata, found.tensors = checkpoint.metadata, dict(checkpoint.tensors)
    for join in joins:
        for name, info in checkpoint.tensors.items():
            if name.endswith(join.whole):
                del found.tensors[name]
                found.tensors |= _cut(checkpoint, info, join)
    return found


def _cut(checkpoint: Checkpoint, info: TensorInfo, join: Joined) -> dict[str, TensorInfo]:
    rows, odd = divmod(info.shape[0], len(join.parts))
    stem = info.name.removesuffix(join.whole)
    # Only zeros that are left out have to be looked at; a cut is a range of bytes.
    values = checkpoint.raw(info.name) if None in join.parts else np.empty(0)
    step = info.nbytes // len(join.parts)
    cut = {}
    for place, part in enumerate(join.parts):
        if odd or (part is None and np.any(values[place * rows : (place + 1) * rows])):
            raise InputRefused(
                f"{info.file}: '{info.name}' of {list(info.shape)} has no place in the published layout; "
                f"expected {len(join.parts)} equal parts, zeros where none is stored"
            )
        if part is not None:
            begin = info.begin + place * step
            shape = (rows, *info.shape[1:])
            name = stem + part
            cut[name] = replace(info, name=name, shape=shape, begin=begin, end=begin + step)
    return cut
