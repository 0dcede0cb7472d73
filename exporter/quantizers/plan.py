"""The plan of every tensor, before one is converted.

Nothing unknown, nothing missing, nothing silently left in float.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat
from exporter.core.errors import InputRefused
from exporter.core.header import shown
from exporter.core.tensors import FLOATS, Checkpoint
from exporter.families.base import DecoderSpec, Role, TensorSpec, VisionSpec
from exporter.quantizers.packing import MIN_BLOCK, packed_bytes
from exporter.quantizers.schemes import Method, Scheme

Kind = Literal["linear", "head", "embedding", "float"]
# Buffers that older transformers saved although they follow from the config; not carried over.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
UNSET = "the scheme keeps this part in float16"
KINDS: dict[Role, Kind] = {
    "decoder": "linear",
    "vision": "linear",
    "head": "head",
    "embedding": "embedding",
    "float": "float",
}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one tensor.

    `format` is None for kind "float", and `reason` says why then; `bytes` is its size in the
    quantized folder.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    format: BlockFormat | None
    method: Method
    reason: str
    bytes: int

    @property
    def rows(self) -> int:
        """The first axis."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """The last axis, along which blocks are cut."""
        return self.shape[-1]

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that store it: name to (safetensors dtype, shape)."""
        fmt = self.format
        if fmt is None:
            return {self.name: ("F16", self.shape)}
        blocks = -(-self.columns // fmt.block)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            self.name + QDATA: ("U8", (self.rows, blocks, fmt.block * fmt.bits // 8)),
            self.name + SCALES: ("F16", (self.rows, blocks)),
        }
        if not fmt.symmetric:
            found[self.name + ZEROS] = ("U8", (self.rows, (blocks * fmt.bits + 7) // 8))
        return found


def plan_layers(
    checkpoint: Checkpoint, decoder: DecoderSpec, tower: VisionSpec, scheme: Scheme
) -> tuple[LayerPlan, ...]:
    """One plan for each tensor of the checkpoint, in the order in which they will be stored.

    A head that is bit for bit the embedding is stored once, under the embedding's name, and has no
    row; neither have buffers that follow from the config. Raises `InputRefused` when a tensor is unknown, missing, of another shape or not floating
    point, or when a tied head differs from the embedding.
    """
    shared = _head_is_embedding(checkpoint, decoder)
    if decoder.tied and decoder.head in checkpoint and not shared:
        raise InputRefused(
            f"tensor '{decoder.head}' differs from '{decoder.embedding}', but config.json says "
            "tie_word_embeddings; set it to false or remove the head"
        )
    decoder = replace(decoder, tied=decoder.tied or shared)
    expected = [*decoder.tensors(), *tower.tensors()]
    _refuse_strangers(
        checkpoint, {e.name for e in expected} | ({decoder.head} if shared else set())
    )
    return tuple(_planned(checkpoint, e, _wanted(e, decoder, scheme), scheme) for e in expected)


def fit_block(columns: int, fmt: BlockFormat, *, whole: bool) -> BlockFormat | None:
    """`fmt` with the block (a power of two from 16 up to its own) that stores a row of `columns`
    values in the fewest bytes, the larger one when equal.

    `whole` admits only blocks that divide `columns` (the embedding's lookup needs that); None when
    there is no such block.
    """
    blocks = [fmt.block >> n for n in range(16) if fmt.block >> n >= MIN_BLOCK]
    if whole:
        blocks = [b for b in blocks if columns % b == 0]
    formats = [replace(fmt, block=b) for b in blocks]
    return min(formats, key=lambda f: packed_bytes(1, columns, f), default=None)


def _wanted(tensor: TensorSpec, decoder: DecoderSpec, scheme: Scheme) -> BlockFormat | None:
    """The format that the scheme gives a tensor by its role."""
    match tensor.role:
        case "decoder":
            return scheme.decoder
        case "vision":
            return scheme.vision
        case "head":
            return scheme.head
        case "embedding" if decoder.tied:
            # A shared matrix is stored as finely as the finer of its two uses asks.
            formats = [f for f in (scheme.embedding, scheme.head) if f]
            return max(formats, key=lambda f: f.bits, default=None)
        case "embedding":
            return scheme.embedding
        case "float":
            return None


def _planned(
    checkpoint: Checkpoint, expected: TensorSpec, fmt: BlockFormat | None, scheme: Scheme
) -> LayerPlan:
    info = checkpoint.info(expected.name)
    if info.shape != expected.shape or info.dtype not in FLOATS:
        raise InputRefused(
            f"tensor '{expected.name}' is {info.dtype} {list(info.shape)}; expected floating point "
            f"{list(expected.shape)} by config.json"
        )
    reason = expected.reason or UNSET
    if fmt is not None:
        fmt = fit_block(expected.shape[1], fmt, whole=expected.role == "embedding")
        reason = "" if fmt else f"{expected.shape[1]} columns are no multiple of {MIN_BLOCK}"
    if fmt is None:
        size = 2 * int(np.prod(expected.shape))
        return LayerPlan(expected.name, "float", expected.shape, None, "none", reason, size)
    size = packed_bytes(expected.shape[0], expected.shape[1], fmt)
    method = scheme.method_for(fmt, inputs=expected.inputs)
    return LayerPlan(expected.name, KINDS[expected.role], expected.shape, fmt, method, "", size)


def _head_is_embedding(checkpoint: Checkpoint, decoder: DecoderSpec) -> bool:
    """Whether the checkpoint holds a head whose bytes are the embedding's."""
    if decoder.head not in checkpoint or decoder.embedding not in checkpoint:
        return False
    head, table = checkpoint.info(decoder.head), checkpoint.info(decoder.embedding)
    if (head.dtype, head.shape) != (table.dtype, table.shape):
        return False
    return checkpoint.same_bytes(decoder.head, decoder.embedding)


def _refuse_strangers(checkpoint: Checkpoint, names: set[str]) -> None:
    unknown = sorted(n for n in checkpoint.tensors.keys() - names if not BUFFERS.search(n))
    missing = sorted(names - checkpoint.tensors.keys())
    for what, found in (("unknown to this architecture", unknown), ("missing", missing)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputRefused(
                f"{len(found)} tensors are {what}: {', '.join(map(shown, found[:3]))}{more}; "
                "expected exactly those that config.json describes"
            )
