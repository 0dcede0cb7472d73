"""Reads GPTQ checkpoints (versions 1 and 2, any g_idx) into our quantized folder.

The format is that of AutoGPTQ and GPTQModel; the method is Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.formats.folder import FloatEntry, Imported, PackedEntry, write_folder
from exporter.formats.gptq_matrix import (
    BLOCKS,
    GptqTensors,
    check_tensors,
    dequantize_gptq,
    from_gptq,
    group_length,
)
from exporter.formats.labels import check_label, gather
from exporter.formats.sources import Source, untied
from exporter.formats.words import per_word, unpack_words

# Matrices that are looked at to judge the label.
JUDGED = 48


@dataclass(frozen=True)
class _Module:
    """A quantized linear layer; `block` is None when it must become float."""

    name: str
    bits: int
    symmetric: bool
    rows: int
    columns: int
    block: int | None


def read_gptq(
    source: Path, out: Path, *, version: int = 0, progress: Progress = silent
) -> Imported:
    """Read the GPTQ checkpoint `source` into the empty folder `out` (our quantized folder).

    Codes, scales and zero points are taken over value for value. A matrix whose groups do not lie
    together (desc_act) is dequantized to float16, and the notes say so. `version` 1 or 2 overrules
    the label. Raises `InputRefused` for shapes that do not fit, a g_idx out of range, 2, 3 or other bits
    than 4 and 8, or a label that the statistics of the zero points contradict.
    """
    opened = Source.open(source, "gptq")
    reader = _Reader(opened, version)
    notes = reader.judge()
    entries = [*reader.matrices(notes), *opened.floats(notes)]
    config = untied(opened, notes)
    found = Imported(f"gptq-v{reader.version}", "gptq", entries, tuple(notes), config)
    return write_folder(source, out, found, progress=progress)


class _Reader:
    def __init__(self, source: Source, version: int) -> None:
        self.source = source
        self.forced = version
        self.version = version or source.settings.version or 1
        self.modules = [self._module(name) for name in source.modules()]

    def judge(self) -> list[str]:
        """Check the label; returns notes. Raises `InputRefused` when it is wrong."""
        step = -(-len(self.modules) // JUDGED)
        some = self.modules[::step]
        evidence = gather((self.tensors(m), m.bits) for m in some)
        where = str(self.source.folder)
        if self.forced:
            return [f"read as version {self.forced} as asked: {evidence.describe()}"]
        note = check_label(where, self.source.settings.version, evidence)
        return [note] if note else []

    def matrices(self, notes: list[str]) -> Iterator[PackedEntry | FloatEntry]:
        """Entries of all quantized modules; adds to `notes` what had to become float."""
        floats = []
        for module in self.modules:
            weight = f"{module.name}.weight"
            if module.block is None:
                floats.append(module.name)
                shape = (module.rows, module.columns)
                reason = "its groups are no blocks of neighbours (desc_act): dequantized"
                yield FloatEntry(weight, shape, reason, partial(self.dequantized, module))
                continue
            form = BlockFormat(module.bits, module.block, module.symmetric)
            yield PackedEntry(
                weight,
                self.source.kind(weight),
                module.rows,
                module.columns,
                form,
                partial(self.packed, module),
            )
        if floats:
            notes.append(
                f"{len(floats)} of {len(self.modules)} matrices have groups that are no blocks of "
                f"neighbouring inputs (desc_act) and were dequantized to float16, first '{floats[0]}'"
            )

    def tensors(self, module: _Module) -> GptqTensors:
        """The module's tensors, checked."""
        source, name = self.source, module.name
        found = GptqTensors(
            source.take(f"{name}.qweight", "I32"),
            source.take(f"{name}.qzeros", "I32"),
            source.scales(name),
            self._g_idx(name, module.columns, module.bits),
        )
        check_tensors(found, module.bits, module.rows, module.columns, name)
        return found

    def packed(self, module: _Module) -> PackedMatrix:
        """The module as packed blocks."""
        packed = from_gptq(
            self._unambiguous(module),
            module.bits,
            self.version,
            symmetric=module.symmetric,
            name=module.name,
        )
        if packed is None:
            raise InputRefused(f"'{module.name}': changed while being read")
        return packed

    def dequantized(self, module: _Module) -> NDArray[np.float32]:
        """The module as float32 ``[rows, columns]``."""
        return dequantize_gptq(self._unambiguous(module), module.bits, self.version)

    def _module(self, name: str) -> _Module:
        settings, where = self.source.settings, self.source.folder
        of = settings.of(name)
        if of is None:
            raise InputRefused(f"{where}: '{name}' is quantized, but dynamic excludes it")
        bits, group = of
        shape = self.source.checkpoint.info(f"{name}.qweight").shape
        if len(shape) != 2 or 0 in shape:
            raise InputRefused(
                f"{where}: '{name}.qweight' has shape {list(shape)}; expected two axes"
            )
        columns, rows = shape[0] * per_word(bits), shape[1]
        g_idx = self._g_idx(name, columns, bits)
        scales = self.source.checkpoint.info(f"{name}.scales").shape
        groups = scales[0] if scales else 0
        expected = 1 if group == -1 else -(-columns // group)
        if groups != expected:
            raise InputRefused(
                f"{where}: '{name}.scales' has {groups} groups; {columns} inputs in groups of {group} "
                f"make {expected}"
            )
        length = group_length(g_idx, groups)
        fits = length is not None and any(length % b == 0 for b in BLOCKS)
        block = next(b for b in BLOCKS if length % b == 0) if length and fits else None
        return _Module(name, bits, self._symmetric(name), rows, columns, block)

    def _symmetric(self, name: str) -> bool:
        return self.source.settings.symmetric_of(name)

    def _g_idx(self, name: str, columns: int, bits: int) -> NDArray[np.int32]:
        key = f"{name}.g_idx"
        if key in self.source.checkpoint:
            g_idx: NDArray[np.int32] = self.source.take(key, "I32")
            if g_idx.shape != (columns,):
                raise InputRefused(
                    f"'{key}' has shape {list(g_idx.shape)}; expected [{columns}] by qweight at {bits} "
                    "bits"
                )
            return g_idx
        if self.source.settings.desc_act:
            raise InputRefused(
                f"'{key}' is missing, and desc_act needs it; the checkpoint is damaged"
            )
        of = self.source.settings.of(name)
        group = columns if of is None or of[1] == -1 else of[1]
        return np.arange(columns, dtype=np.int32) // np.int32(group)

    def _unambiguous(self, module: _Module) -> GptqTensors:
        """The tensors, unless loaders would read their zero points differently."""
        tensors = self.tensors(module)
        # A field of ones in version 1 is a zero point 0 by GPTQModel (with a borrow), 16 by others.
        if self.version != 1 or "gptqmodel" in self.source.settings.quantizer.lower():
            return tensors
        top = (1 << module.bits) - 1
        fields = unpack_words(tensors.qzeros, module.bits)
        count = int((fields == top).sum())
        if count:
            raise InputRefused(
                f"'{module.name}': {count} of {fields.size} zero fields are {top}, which in version 1 "
                "loaders read differently (as 0, as one more than the largest code, or as a borrow), "
                "and no known writer is named; convert it to gptq_v2 with the tool that wrote it"
            )
        return tensors
