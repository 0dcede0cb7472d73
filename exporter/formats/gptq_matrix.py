"""One matrix between our packed blocks and GPTQ's four tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, unpack
from exporter.core.errors import InputRefused
from exporter.formats.words import (
    Words,
    as_bytes,
    ones,
    pack_bytes,
    pack_words,
    per_word,
    unpack_words,
)

# The blocks that onnxruntime's kernels have; a larger group is stored as several blocks.
BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class GptqTensors:
    """GPTQ's tensors of a linear layer with K inputs and N outputs, in G groups.

    qweight: int32 ``[K * bits / 32, N]``; qzeros: int32 ``[G, N * bits / 32]`` (zero points, less one
    in version 1); scales: float16 ``[G, N]``; g_idx: int32 ``[K]``, the group of each input.
    """

    qweight: Words
    qzeros: Words
    scales: NDArray[np.float16]
    g_idx: NDArray[np.int32]


def to_gptq(
    matrix: PackedMatrix, version: int, name: str = "matrix", *, group: int | None = None
) -> GptqTensors:
    """A packed ``[N, K]`` matrix as GPTQ tensors of `version` 1 or 2, value for value.

    `group`: a divisor of the block, which then becomes several groups of one scale.

    Raises `InputRefused` naming `name` when GPTQ has no place for it: K not a whole number of
    groups, N not a whole number of words, or in version 1 a zero point 0 (its field would be -1,
    which loaders read as 0, as 16, or as a borrow from the neighbour).
    """
    form, rows, columns = matrix.format, matrix.rows, matrix.columns
    if columns % form.block or columns % 32 or rows % 32:
        raise InputRefused(
            f"'{name}' is [{rows}, {columns}] in blocks of {form.block}; GPTQ kernels need both to be "
            "multiples of 32 and whole blocks; leave it in float (--only-decoder) or use another block"
        )
    words: Words = matrix.qdata.reshape(rows, -1).view("<i4")
    if matrix.zero_points is None:
        zeros = np.full((rows, matrix.blocks), form.middle, np.uint8)
    else:
        zeros = unpack(matrix.zero_points, form.bits, matrix.blocks)
    length = group or form.block
    repeat = form.block // length
    zeros = np.repeat(zeros, repeat, axis=1)
    qzeros = pack_words(zeros.T, form.bits)
    if version == 1:
        none = int((zeros == 0).sum())
        if none:
            raise InputRefused(
                f"'{name}': {none} of {zeros.size} zero points are 0, which GPTQ version 1 (zero minus "
                "one) cannot store unambiguously; write gptq-v2"
            )
        qzeros = (qzeros.view(np.uint32) - ones(form.bits)).view(np.int32)
    return GptqTensors(
        np.ascontiguousarray(words.T),
        qzeros,
        np.ascontiguousarray(np.repeat(matrix.scales, repeat, axis=1).T),
        np.arange(columns, dtype=np.int32) // np.int32(length),
    )


def zero_points(qzeros: Words, bits: int, version: int) -> NDArray[np.uint8]:
    """Zero points ``[G, N]``; version 1 adds one to whole words, as its writers subtract it."""
    if version == 1:
        qzeros = (qzeros.view(np.uint32) + ones(bits)).view(np.int32)
    return unpack_words(qzeros, bits)


def check_tensors(tensors: GptqTensors, bits: int, rows: int, columns: int, name: str) -> None:
    """Raise `InputRefused` unless the tensors are those of an ``[N, K]`` matrix.

    Shapes must fit, g_idx stay within the groups, scales be finite.
    """
    if tensors.scales.ndim != 2 or not tensors.scales.size:
        raise InputRefused(
            f"'{name}.scales' has shape {list(tensors.scales.shape)}; expected [groups, {rows}]"
        )
    groups, word = len(tensors.scales), per_word(bits)
    expected = {
        "qweight": (columns // word, rows),
        "qzeros": (groups, rows // word),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for part, shape in expected.items():
        found = getattr(tensors, part).shape
        if found != shape or columns % word or rows % word:
            raise InputRefused(
                f"'{name}.{part}' has shape {list(found)}; expected {list(shape)} for a {bits}-bit "
                f"[{rows}, {columns}] matrix"
            )
    low, high = int(tensors.g_idx.min()), int(tensors.g_idx.max())
    if low < 0 or high >= groups:
        raise InputRefused(
            f"'{name}.g_idx' holds groups {low} to {high}; there are {groups} (0 to {groups - 1})"
        )
    if not np.isfinite(tensors.scales).all():
        raise InputRefused(f"'{name}.scales' holds NaN or infinity; the checkpoint is damaged")


def group_length(g_idx: NDArray[np.int32], groups: int) -> int | None:
    """Values per group when the groups lie one after the other (the last may be shorter), else None."""
    columns = len(g_idx)
    length = int((g_idx == 0).sum())
    if length and -(-columns // length) == groups:
        same = np.array_equal(g_idx, np.arange(columns, dtype=np.int32) // np.int32(length))
        return length if same else None
    return None


def from_gptq(
    tensors: GptqTensors, bits: int, version: int, *, symmetric: bool, name: str = "matrix"
) -> PackedMatrix | None:
    """The packed matrix of checked tensors, or None when no block of ours fits the groups.

    That is so when the inputs of a group do not lie together (activation order without a permutation
    of the inputs), or its length has no power of two from 16. Groups longer than 256 become several
    blocks of one scale. `symmetric`: store no zero points, if all are the middle.
    """
    groups, rows = tensors.scales.shape
    columns = len(tensors.g_idx)
    length = group_length(tensors.g_idx, groups)
    block = None if length is None else next((b for b in BLOCKS if length % b == 0), None)
    if length is None or block is None:
        return None
    repeat, blocks = length // block, -(-columns // block)
    scales = np.repeat(tensors.scales.T, repeat, axis=1)[:, :blocks]
    zeros = np.repeat(zero_points(tensors.qzeros, bits, version).T, repeat, axis=1)[:, :blocks]
    form = BlockFormat(bits, block, symmetric)
    if symmetric and (zeros != form.middle).any():
        raise InputRefused(
            f"'{name}': settings say sym, but {float((zeros != form.middle).mean()):.1%} of its zero "
            f"points are not {form.middle}; correct sym"
        )
    packed = as_bytes(np.ascontiguousarray(tensors.qweight.T))
    # Codes of the padding are never multiplied by anything but 0.
    packed = np.pad(packed, ((0, 0), (0, blocks * block * bits // 8 - packed.shape[1])))
    return PackedMatrix(
        form,
        columns,
        packed.reshape(rows, blocks, -1),
        np.ascontiguousarray(scales),
        None if symmetric else pack_bytes(np.ascontiguousarray(zeros), bits),
    )


def dequantize_gptq(tensors: GptqTensors, bits: int, version: int) -> NDArray[np.float32]:
    """The float32 ``[N, K]`` matrix of checked tensors, for any g_idx."""
    zeros = zero_points(tensors.qzeros, bits, version).astype(np.float32)
    codes = unpack_words(np.ascontiguousarray(tensors.qweight.T), bits).astype(np.float32)
    scales = tensors.scales.astype(np.float32)
    codes -= zeros.T[:, tensors.g_idx]
    codes *= scales.T[:, tensors.g_idx]
    return codes
