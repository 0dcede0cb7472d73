"""Whether a GPTQ file is of the version that its label says, by the statistics of its zero points.

Version 1 stores zero points less one, version 2 as they are; read with the wrong label, every
weight is off by one scale, and loaders do that silently. Weights have a mean near zero, far below
one scale, and symmetric zero points are all the middle: both give a wrong label away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.formats.gptq_matrix import GptqTensors
from exporter.formats.words import unpack_words

# Share of zero fields on one value from which a file counts as symmetric.
NEARLY_ALL = 0.99
# How far from the middle of both readings the mean must lie: in scales, and in standard errors.
MARGIN, ERRORS = 0.25, 3.0


@dataclass(frozen=True)
class Evidence:
    """Figures of the zero fields as stored, over `matrices` matrices.

    below_middle, middle: share of fields that are 7 and 8 (127 and 128 for 8 bits); offset: mean of
    ``code - field``, that is the mean weight in scales if the file is of version 2 (of version 1:
    `offset` - 1), with the standard `error` of that mean over the rows.
    """

    matrices: int
    below_middle: float
    middle: float
    offset: float
    error: float

    @property
    def version(self) -> int:
        """1 or 2 by the statistics, 0 when they do not tell."""
        if self.below_middle >= NEARLY_ALL or self.middle >= NEARLY_ALL:
            return 1 if self.below_middle > self.middle else 2
        beyond = self.offset - 0.5
        if abs(beyond) < max(MARGIN, ERRORS * self.error):
            return 0
        return 1 if beyond > 0 else 2

    def describe(self) -> str:
        """The figures in one phrase."""
        return (
            f"over {self.matrices} matrices {self.below_middle:.1%} of the zero fields are one below "
            f"the middle and {self.middle:.1%} the middle, and the mean weight is "
            f"{self.offset - 1:+.2f} scales read as version 1, {self.offset:+.2f} as version 2 "
            f"(standard error {self.error:.2f})"
        )


def gather(matrices: Iterable[tuple[GptqTensors, int]]) -> Evidence:
    """Evidence from some matrices of a checkpoint, each with its bits."""
    count = fields = below = middle = 0
    rows: list[NDArray[np.float64]] = []
    for tensors, bits in matrices:
        stored = unpack_words(tensors.qzeros, bits)
        codes = unpack_words(tensors.qweight.T, bits)
        lengths = np.bincount(tensors.g_idx, minlength=len(stored))
        half = 1 << (bits - 1)
        count += 1
        fields += stored.size
        below += int((stored == half - 1).sum())
        middle += int((stored == half).sum())
        rows.append(codes.mean(axis=1) - lengths @ stored.astype(np.float64) / codes.shape[1])
    if not count:
        raise ValueError("no matrix to judge by")
    means = np.concatenate(rows)
    error = float(means.std() / np.sqrt(len(means)))
    return Evidence(count, below / fields, middle / fields, float(means.mean()), error)


def check_label(where: str, label: int, evidence: Evidence) -> str:
    """Raise `InputRefused` when the statistics contradict the label (0: none, which means 1).

    Returns a note when they do not tell, else "".
    """
    claimed = label or 1
    found = evidence.version
    if found == 0:
        return (
            f"the zero points do not tell the version, the label is trusted: {evidence.describe()}"
        )
    if found == claimed:
        return ""
    says = (
        f"labelled GPTQ version {label}" if label else "without a label, which means GPTQ version 1"
    )
    raise InputRefused(
        f"{where}: {says}, but its zero points are those of version {found}: {evidence.describe()}; "
        f"set checkpoint_format to {'gptq' if found == 1 else 'gptq_v2'}, or give --gptq-version if "
        "you know better"
    )
