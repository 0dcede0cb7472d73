"""Bytes and operations that follow from a model's shape and a scheme, whatever the machine."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.core.blocks import BlockFormat
from exporter.families.shapes.parts import ModelShape, Part, Weights
from exporter.quantizers.packing import packed_bytes
from exporter.quantizers.plan import fit_block
from exporter.quantizers.schemes import Scheme

FLOAT16 = 2


@dataclass(frozen=True)
class StoredWeights:
    """One kind of matrix as a scheme stores it; `format` None: float16. Bytes are of all `count`."""

    weights: Weights
    format: BlockFormat | None

    @property
    def bytes(self) -> int:
        """As stored on disk: codes, scales and zero points, or two bytes a value."""
        w = self.weights
        if self.format is None:
            return FLOAT16 * w.parameters
        return packed_bytes(w.rows, w.columns, self.format) * w.count

    @property
    def scales(self) -> int:
        """Number of block scales."""
        w = self.weights
        return w.rows * -(-w.columns // self.format.block) * w.count if self.format else 0


def stored(shape: ModelShape, scheme: Scheme) -> tuple[StoredWeights, ...]:
    """Each kind of matrix with the format the scheme gives it.

    The rules are those of `quantizers.plan`: the block that takes fewest bytes, float16 where no
    block fits, a shared table as fine as the finer of its two uses. Linear layers of a text encoder
    are stored like a decoder's.
    """
    tied = shape.decoder is not None and shape.decoder.tied
    return tuple(StoredWeights(w, _format(w, scheme, tied=tied)) for w in shape.weights)


def part_bytes(shape: ModelShape, scheme: Scheme) -> dict[Part, int]:
    """Weight bytes on disk by part, graphs not counted."""
    sizes: dict[Part, int] = {}
    for item in stored(shape, scheme):
        part = item.weights.part
        sizes[part] = sizes.get(part, 0) + item.bytes
    return sizes


def weight_bytes(shape: ModelShape, scheme: Scheme) -> int:
    """Weight bytes on disk of all parts."""
    return sum(part_bytes(shape, scheme).values())


def token_bytes(shape: ModelShape, scheme: Scheme) -> int:
    """Weight bytes that writing one token reads: the decoder's matrices and the head."""
    return sum(
        s.bytes for s in stored(shape, scheme) if s.weights.part == "decoder" and s.weights.rows_in
    )


def tower_operations(shape: ModelShape) -> int:
    """Operations of the vision part for one image at the image limit (a multiply-add is two).

    Kernels of patches and normalisations are left out: about one per cent.
    """
    if shape.tower is None:
        return 0
    per_tile = _matrix_operations(shape, "vision") + shape.tower.attention_operations
    return per_tile * shape.tower.tiles


def text_operations(shape: ModelShape) -> int:
    """Operations of the text encoder for one full-length text."""
    if shape.text is None:
        return 0
    return _matrix_operations(shape, "text") + shape.text.attention_operations


def prefill_operations(shape: ModelShape, prompt: int) -> int:
    """Operations of the decoder over a prompt of `prompt` positions; the head runs on the last."""
    d = shape.decoder
    if d is None:
        return 0
    each = sum(
        2 * w.parameters
        for w in shape.weights
        if w.part == "decoder" and w.role == "linear" and w.rows_in
    )
    # Scores and weighted sums; a causal mask leaves half of them.
    attention = 4 * d.layers * prompt**2 * d.heads * d.head_dim // (1 if d.quadratic else 2)
    cross = 4 * d.cross_layers * prompt * d.cross_tokens * d.cross_width
    return prompt * each + attention + cross + 2 * d.vocabulary * d.hidden


def token_operations(shape: ModelShape, context: int) -> int:
    """Operations of one more token behind `context` positions."""
    d = shape.decoder
    if d is None:
        return 0
    matrices = sum(
        2 * w.parameters
        for w in shape.weights
        if w.part == "decoder" and w.role != "float" and w.rows_in
    )
    cross = 4 * d.cross_layers * d.cross_tokens * d.cross_width
    return matrices + 4 * d.seen(context) * d.heads * d.head_dim + cross


def _matrix_operations(shape: ModelShape, part: Part) -> int:
    """Of linear layers and convolutions; what is looked up or added has no `rows_in`."""
    return sum(2 * w.parameters * w.rows_in for w in shape.weights if w.part == part)


def _format(w: Weights, scheme: Scheme, *, tied: bool) -> BlockFormat | None:
    asked = _asked(w, scheme, tied=tied)
    if asked is None:
        return None
    return fit_block(w.columns, asked, whole=w.role == "embedding")


def _asked(w: Weights, scheme: Scheme, *, tied: bool) -> BlockFormat | None:
    match w.role:
        case "linear":
            return scheme.vision if w.part == "vision" else scheme.decoder
        case "head":
            return scheme.head
        case "embedding" if tied and w.part == "decoder":
            both = [f for f in (scheme.embedding, scheme.head) if f]
            return max(both, key=lambda f: f.bits, default=None)
        case "embedding":
            return scheme.embedding
        case _:
            return None
