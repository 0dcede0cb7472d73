"""Reads AWQ checkpoints (AutoAWQ's gemm packing, 4 bits) into our quantized folder.

Lin et al., arXiv 2306.00978; the activation scales are already folded into the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.formats.folder import Entry, Imported, PackedEntry, write_folder
from exporter.formats.gptq_matrix import BLOCKS
from exporter.formats.sources import Source, untied
from exporter.formats.words import Words, pack_bytes, unpack_words

BITS, PER_WORD = 4, 8
# Field i of a word holds column ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = np.argsort(ORDER)


def unpack_gemm(words: Words) -> NDArray[np.uint8]:
    """Columns in their order, uint8 ``[R, 8 * W]``, of gemm-packed words ``[R, W]``."""
    fields = unpack_words(words, BITS).reshape(len(words), -1, PER_WORD)
    return fields[..., PLACES].reshape(len(words), -1)


def from_awq(
    qweight: Words, qzeros: Words, scales: NDArray[np.float16], *, name: str = "matrix"
) -> PackedMatrix:
    """The packed ``[N, K]`` matrix of AWQ's tensors, value for value.

    qweight: int32 ``[K, N / 8]``; qzeros: int32 ``[G, N / 8]``; scales: float16 ``[G, N]``. Raises
    `InputRefused` when the shapes do not fit each other or the groups no block of ours.
    """
    columns, rows = qweight.shape[0], qweight.shape[1] * PER_WORD
    groups = scales.shape[0]
    shapes_fit = scales.shape == (groups, rows) and qzeros.shape == (groups, rows // PER_WORD)
    if not groups or columns % groups or not shapes_fit:
        raise InputRefused(
            f"'{name}': qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales "
            f"{list(scales.shape)} do not fit; expected [K, N/8], [G, N/8], [G, N]"
        )
    if not np.isfinite(scales).all():
        raise InputRefused(f"'{name}.scales' holds NaN or infinity; the checkpoint is damaged")
    block = awq_block(columns // groups, name)
    repeat = columns // groups // block
    codes = np.ascontiguousarray(unpack_gemm(qweight).T).reshape(rows, -1, block)
    zeros = np.repeat(unpack_gemm(qzeros).T, repeat, axis=1)
    return PackedMatrix(
        BlockFormat(BITS, block, symmetric=False),
        columns,
        pack_bytes(codes, BITS),
        np.ascontiguousarray(np.repeat(scales.T, repeat, axis=1)),
        pack_bytes(zeros, BITS),
    )


def awq_block(length: int, name: str) -> int:
    """The block in which a group of `length` inputs is stored. Raises `InputRefused` if none fits."""
    for block in BLOCKS:
        if length % block == 0:
            return block
    raise InputRefused(f"'{name}': groups of {length}; expected a multiple of {BLOCKS[-1]}")


def read_awq(source: Path, out: Path, *, progress: Progress = silent) -> Imported:
    """Read the AWQ checkpoint `source` into the empty folder `out` (our quantized folder).

    Raises `InputRefused` for other bits than 4, other packings than gemm, a checkpoint without zero
    points, and shapes that do not fit.
    """
    opened = Source.open(source, "awq")
    if opened.settings.bits != BITS:
        raise InputRefused(f"{source}: AWQ with {opened.settings.bits} bits; expected {BITS}")
    notes: list[str] = []
    entries: list[Entry] = [
        *(_entry(opened, m) for m in opened.modules()),
        *opened.floats(notes),
    ]
    config = untied(opened, notes)
    found = Imported("awq", "awq", entries, tuple(notes), config)
    return write_folder(source, out, found, progress=progress)


def _entry(source: Source, module: str) -> PackedEntry:
    shape = source.checkpoint.info(f"{module}.qweight").shape
    scales = source.checkpoint.info(f"{module}.scales").shape
    if len(shape) != 2 or len(scales) != 2 or 0 in shape or not scales[0] or shape[0] % scales[0]:
        raise InputRefused(
            f"{source.folder}: '{module}' has qweight {list(shape)} and scales {list(scales)}; expected "
            "[K, N/8] and [G, N] with G dividing K"
        )
    weight, group = f"{module}.weight", source.settings.group
    length = shape[0] // scales[0]
    if length != (shape[0] if group == -1 else group):
        raise InputRefused(
            f"{source.folder}: '{module}' has groups of {length}; the settings say {group}"
        )
    form = BlockFormat(BITS, awq_block(length, module), symmetric=False)

    def read() -> PackedMatrix:
        return from_awq(
            source.take(f"{module}.qweight", "I32"),
            source.take(f"{module}.qzeros", "I32"),
            source.scales(module),
            name=module,
        )

    return PackedEntry(weight, source.kind(weight), shape[1] * PER_WORD, shape[0], form, read)
