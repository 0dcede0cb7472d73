"""bitsandbytes' storage of linear layers: nf4 and int8.

nf4: Dettmers et al., QLoRA, arXiv 2305.14314 (no double quantization: the maxima stay float32).
int8: Dettmers et al., LLM.int8(), arXiv 2208.07339, its weights: one absmax per row of 127 steps.
Its split of outlier inputs is a matter of the kernel and not of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, dequantize_nf4, quantize_nf4
from exporter.core.tensors import Checkpoint
from exporter.quantizers.guards import guard
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.ready import ReadyTensor, packed_tensors

STEPS = 127


class BnbMatrices:
    """`ReadyTensors`: the plan's matrices as bitsandbytes quantizes them, each when it is taken."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def take(self, plan: LayerPlan) -> ReadyTensor | None:
        """The stored tensors of a planned matrix, None for a tensor that stays float.

        Raises `InputRefused` when a value is not finite or out of range.
        """
        if plan.format is None:
            return None
        weight = self._checkpoint.float32(plan.name)
        if plan.turned:
            weight = np.ascontiguousarray(weight.T)
        if plan.method == "bnb-nf4":
            return _nf4(plan, weight)
        packed = int8_rows(weight, plan.format.block, plan.name)
        squares = np.einsum("nk,nk->k", weight, weight)
        notes = guard(packed, squares, of="weights", name=plan.name).document()
        error = _relative(weight, dequantize(packed))
        return ReadyTensor(packed_tensors(plan.name, packed), error, notes)


def int8_rows(weight: NDArray[np.float32], block: int, name: str = "matrix") -> PackedMatrix:
    """LLM.int8()'s codes ``rint(w * 127 / absmax of the row)`` of ``[N, K]``, K in whole blocks.

    The row's scale, absmax / 127 rounded to float16, is repeated for each block. Raises
    `InputRefused` naming `name` when a value is not finite or needs a scale beyond float16.
    """
    rows, columns = weight.shape
    absmax = np.abs(weight).max(axis=1, initial=0.0)
    with np.errstate(over="ignore"):
        scales = (absmax / np.float32(STEPS)).astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputRefused(f"tensor '{name}' holds {absmax.max()}; expected finite values in range")
    inverse = np.divide(np.float32(STEPS), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = (np.rint(weight * inverse[:, None]) + np.float32(128)).astype(np.uint8)
    return PackedMatrix(
        BlockFormat(8, block, symmetric=True),
        columns,
        codes.reshape(rows, -1, block),
        np.repeat(scales[:, None], columns // block, axis=1),
        None,
    )


def _nf4(plan: LayerPlan, weight: NDArray[np.float32]) -> ReadyTensor:
    try:
        matrix = quantize_nf4(weight)
    except ValueError as error:
        raise InputRefused(f"tensor '{plan.name}': {error}; repair the checkpoint") from error
    stored: dict[str, NDArray[Any]] = {
        plan.name + NF4_DATA: matrix.data,
        plan.name + NF4_SCALES: matrix.absmax,
    }
    return ReadyTensor(stored, _relative(weight, dequantize_nf4(matrix)), {"code": "nf4"})


def _relative(weight: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - found)) / norm if norm else 0.0
