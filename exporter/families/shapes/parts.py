"""Sizes of a model as small records, and the matrices that common blocks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from exporter.families.shapes.facts import ConfigFacts

Part = Literal["vision", "text", "decoder"]
Role = Literal["linear", "head", "embedding", "float"]
Kind = Literal["captioner", "summariser", "matcher", "segmenter", "encoder"]


@dataclass(frozen=True)
class Weights:
    """`count` equal matrices ``[rows, columns]``; role "float": never quantized (norms, biases).

    `rows_in`: how many rows of activations one use multiplies: per tile (vision), per text (text),
    per token (decoder; 0 for what is looked up or cached, and then costs nothing per token). A
    convolution is a float matrix of outputs by inputs of one place, used once at each place.
    """

    part: Part
    role: Role
    rows: int
    columns: int
    count: int = 1
    rows_in: int = 0

    @property
    def parameters(self) -> int:
        """Number of values."""
        return self.rows * self.columns * self.count

    @property
    def convolution(self) -> bool:
        """Whether it is the kernel of a convolution."""
        return self.role == "float" and self.rows_in > 0


@dataclass(frozen=True)
class EncoderShape:
    """Transformer blocks over a fixed sequence: a vision tower (per tile) or a text encoder.

    `attended`: positions that one position sees, per layer; more than one value where layers differ
    (windows), none in a tower of convolutions alone. `maps`: values of the feature maps that live
    together where they are largest, in one tile; several graphs' are added. `tiles`: crops of one
    image at the image limit, 1 for text; `together`: so many of them go through the graph in one run,
    because later steps join them.
    """

    hidden: int
    inner: int
    heads: int
    sequence: int
    attended: tuple[int, ...]
    tiles: int = 1
    side: int = 0
    """Pixels along one side of a tile; 0 for text, and for towers of any resolution `pixels` says."""
    pixels: int = 0
    together: int = 1
    maps: int = 0

    @property
    def attention_operations(self) -> int:
        """Operations of scores and weighted sums of one tile, all layers (a multiply-add is two)."""
        return sum(4 * self.sequence * seen * self.hidden for seen in self.attended)


@dataclass(frozen=True)
class DecoderShape:
    """A decoder that writes text; `cross_*` is what it caches of an encoder, 0 where it has none.

    `image_tokens`: positions of the prompt that one image takes at the image limit, markers
    included (0 where the image is reached by cross-attention only). `quadratic`: whether attention
    over the prompt runs both ways somewhere, so that it cannot be cut into pieces. `windows`: how many
    of the last positions a token reads in each layer that does not read all; keys and values of all
    positions are kept in those layers too.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    image_tokens: int
    tied: bool
    cross_layers: int = 0
    cross_tokens: int = 0
    cross_width: int = 0
    quadratic: bool = False
    windows: tuple[int, ...] = ()

    def cache_values(self, positions: int) -> int:
        """Keys and values of one text of `positions` positions, and of its image's cross-attention."""
        return self._cached(self.layers * positions)

    def read_values(self, positions: int) -> int:
        """As `cache_values`, those that writing one token behind `positions` positions reads."""
        return self._cached(self.seen(positions))

    def seen(self, positions: int) -> int:
        """Positions that one token attends to, summed over the layers."""
        full = (self.layers - len(self.windows)) * positions
        return full + sum(min(window, positions) for window in self.windows)

    def _cached(self, places: int) -> int:
        own = 2 * places * self.kv_heads * self.head_dim
        return own + 2 * self.cross_layers * self.cross_tokens * self.cross_width


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model: its matrices, and the sequences that run through them."""

    kind: Kind
    weights: tuple[Weights, ...]
    tower: EncoderShape | None = None
    text: EncoderShape | None = None
    decoder: DecoderShape | None = None

    @property
    def parameters(self) -> int:
        """Number of values in all parts."""
        return sum(w.parameters for w in self.weights)


ShapeOf = Callable[[ConfigFacts], ModelShape]


def linear(
    part: Part,
    rows: int,
    columns: int,
    *,
    count: int = 1,
    bias: bool = False,
    rows_in: int = 1,
) -> tuple[Weights, ...]:
    """`count` linear layers, with their biases."""
    matrix = Weights(part, "linear", rows, columns, count, rows_in)
    return (matrix, Weights(part, "float", rows, 1, count)) if bias else (matrix,)


def norm(part: Part, size: int, *, count: int = 1, bias: bool = True) -> tuple[Weights, ...]:
    """`count` normalisations: scale, and shift where `bias`."""
    return (Weights(part, "float", size, 2 if bias else 1, count),)


def other(part: Part, rows: int, columns: int = 1, *, count: int = 1) -> tuple[Weights, ...]:
    """Values that stay in float: position tables, patch kernels, gates."""
    return (Weights(part, "float", rows, columns, count),)


def convolution(outputs: int, inputs: int, side: int, places: int) -> tuple[Weights, ...]:
    """A kernel ``[outputs, inputs, side, side]`` without bias, used at `places` places of a map."""
    return (Weights("vision", "float", outputs, inputs * side**2, rows_in=places),)


def batch_norm(size: int, *, count: int = 1) -> tuple[Weights, ...]:
    """`count` batch norms: weight, bias, mean and variance."""
    return (Weights("vision", "float", size, 4, count),)


def plain_blocks(
    part: Part, layers: int, hidden: int, inner: int, rows_in: int
) -> tuple[Weights, ...]:
    """Blocks of the ViT, CLIP, BERT kind: four projections and two layers, all with bias, two norms."""
    return (
        *linear(part, hidden, hidden, count=4 * layers, bias=True, rows_in=rows_in),
        *linear(part, inner, hidden, count=layers, bias=True, rows_in=rows_in),
        *linear(part, hidden, inner, count=layers, bias=True, rows_in=rows_in),
        *norm(part, hidden, count=2 * layers),
    )


def gated_mlp(
    part: Part, layers: int, hidden: int, inner: int, *, bias: bool = False, rows_in: int = 1
) -> tuple[Weights, ...]:
    """Gate, up and down projection of `layers` blocks."""
    return (
        *linear(part, inner, hidden, count=2 * layers, bias=bias, rows_in=rows_in),
        *linear(part, hidden, inner, count=layers, bias=bias, rows_in=rows_in),
    )


def llama_decoder(shape: DecoderShape, *, qkv_bias: bool = False) -> tuple[Weights, ...]:
    """Llama, Mistral, Qwen2: grouped keys, gated MLP, RMS norms without bias."""
    d, hidden = shape, shape.hidden
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    return (
        *embedding(d),
        *linear("decoder", queries, hidden, count=d.layers, bias=qkv_bias),
        *linear("decoder", keys, hidden, count=2 * d.layers, bias=qkv_bias),
        *linear("decoder", hidden, queries, count=d.layers),
        *gated_mlp("decoder", d.layers, hidden, d.inner),
        *norm("decoder", hidden, count=2 * d.layers + 1, bias=False),
    )


def embedding(d: DecoderShape, *, head_bias: bool = False) -> tuple[Weights, ...]:
    """The token table and the head; a tied head is the table, and is used once per token."""
    table = Weights("decoder", "embedding", d.vocabulary, d.hidden, rows_in=1 if d.tied else 0)
    if d.tied:
        return (table,)
    head = Weights("decoder", "head", d.vocabulary, d.hidden, rows_in=1)
    return (table, head, *(other("decoder", d.vocabulary) if head_bias else ()))
