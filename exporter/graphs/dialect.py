"""What a graph is written in: onnxruntime's own operators (no dialect), or another set of them.

The writers of parts say what they mean in onnxruntime's operators. A `Dialect` that a `GraphWriter`
was opened with gets everything that is not ai.onnx, and says it in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from exporter.core.blocks import PackedMatrix
from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.matrices import Matrix

if TYPE_CHECKING:
    from exporter.graphs.writer import GraphWriter

Attributes = Mapping[str, int | float | str | Sequence[int]]


@dataclass(frozen=True)
class Reach:
    """Which keys a position sees, where that is not all up to its own place.

    `place` and `last`: int64 ``[batch, sequence]``, each position's place in its row's text and the last
    place that it sees, which lies behind its own only behind an empty past. `window`: so many places up
    to its own, and those behind it; 0 for all.
    """

    place: str
    last: str
    window: int


class TextOps(Protocol):
    """What `graphs.texts.TextGraph` needs of a dialect, for one decoder graph."""

    def places(self) -> str:
        """The place of every position in its row's text, int64 ``[batch, sequence]``."""
        ...

    def keep(self, name: str, x: str) -> str:
        """The positions of `x` ``[batch, sequence, width]`` whose logits are asked for."""
        ...

    def attention(
        self,
        layer: int,
        queries_keys_values: Sequence[str],
        tables: Sequence[str],
        prefix: str,
        reach: Reach | None,
    ) -> str:
        """Causal attention with its past and present; see `graphs.texts.TextGraph.attention`."""
        ...


class Dialect(Protocol):
    """Says in other operators what a graph would say in onnxruntime's; values are float32.

    `widened`: matrices that were stored in more bits than they came in, and why.
    """

    widened: dict[str, str]

    def lowered(
        self, op: str, name: str, inputs: Sequence[str], outputs: list[str], attributes: Attributes
    ) -> None:
        """The nodes that do what `op` does. Raises `InputRefused` for one that it cannot say."""
        ...

    def product(self, name: str, x: str, matrix: Matrix, output: str | None) -> str:
        """``x @ matrix.T``, named `output` where that is given. Raises `InputRefused`."""
        ...

    def rows(self, table: PackedMatrix, ids: str, out: str) -> str:
        """Rows `ids` of a packed table as the value `out`. Raises `InputRefused`."""
        ...

    def attention(self, name: str, inputs: Sequence[str], heads: int, head_dim: int) -> str:
        """Attention without a past; see `graphs.attention.attention`."""
        ...

    def turned(
        self, name: str, x: str, turns: Sequence[str], heads: int, sizes: tuple[int, int]
    ) -> str:
        """Heads ``[batch, length, heads * head_dim]`` turned by the angles whose cosines and sines
        ``[..., length, rotary / 2]`` are `turns`; `sizes`: head_dim and how much of it turns.
        """
        ...

    def angles(self, name: str, positions: str, radians: str) -> str:
        """``positions @ radians`` for positions float32 ``[..., axes]``, exact where all but one factor
        of each sum are 0.
        """
        ...

    def looked_up(self, tables: Sequence[str], places: str) -> list[str]:
        """The rows `places` of each table."""
        ...

    def text(self, spec: TextDecoder) -> TextOps:
        """The inputs, lengths and causal attention of a decoder graph whose inputs are declared."""
        ...


OpenDialect = Callable[["GraphWriter"], Dialect]
