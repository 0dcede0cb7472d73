"""What all kinds of decoders have in common: the attributes that code outside of a kind may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from exporter.families.base import Feed, TensorSpec


class TextDecoder(Protocol):
    """A causal decoder of any kind; sizes in elements. `graphs.parts` has a writer for each kind.

    It is a frozen dataclass: `dataclasses.replace` makes the same one with another `tied`.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def hidden_size(self) -> int:
        """Width of an embedding and of a hidden state."""
        ...

    @property
    def layers(self) -> int:
        """Number of blocks, each with keys and values of its own."""
        ...

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def max_positions(self) -> int:
        """Positions of prompt and answer together."""
        ...

    @property
    def embedding(self) -> str:
        """Whole name of the embedding's tensor."""
        ...

    @property
    def head(self) -> str:
        """Whole name of the head's tensor."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        ...

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has: the embedding first, the head (unless tied) last."""
        ...

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph: a prompt, and one token behind three in a batch of two."""
        ...


def example_texts(
    spec: TextDecoder, rng: np.random.Generator
) -> Iterator[tuple[int, int, int, dict[str, NDArray[Any]]]]:
    """Batch, length and past length at two shapes, with the inputs that every decoder graph has."""
    for batch, length, past, keep in ((1, 5, 0, 1), (2, 1, 3, 0)):
        feed: dict[str, NDArray[Any]] = {
            "inputs_embeds": rng.standard_normal((batch, length, spec.hidden_size), np.float32),
            "attention_mask": np.ones((batch, past + length), np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        shape = (batch, spec.kv_heads, past, spec.head_dim)
        for layer in range(spec.layers):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                feed[name] = rng.standard_normal(shape, np.float32)
        yield batch, length, past, feed
