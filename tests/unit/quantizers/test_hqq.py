from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.quantizers.hqq import HqqSettings, hqq_matrix
from exporter.quantizers.rtn import quantize_matrix
from tests.unit.quantizers.correlated import weights


def objective(w: NDArray[np.float32], m: PackedMatrix) -> NDArray[np.float64]:
    """Sum of |error|**0.7 for each block."""
    blocks = np.abs(dequantize(m).astype("f8") - w) ** 0.7
    return blocks.reshape(w.shape[0], -1, m.format.block).sum(axis=2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_its_objective_is_lower_than_with_round_to_nearest(
    bits: int, block: int, symmetric: bool
) -> None:
    w, fmt = weights(48, 256), BlockFormat(bits, block, symmetric)

    found = objective(w, hqq_matrix(w, fmt))

    for search in (False, True):
        nearest = objective(w, quantize_matrix(w, fmt, search=search))
        assert np.all(found <= nearest * (1 + 1e-5))
        # At 8 bits around zero the search over both signs leaves little to gain.
        assert found.sum() < (0.998 if symmetric and bits == 8 else 0.995) * nearest.sum()


def test_more_rounds_never_make_it_worse() -> None:
    w, fmt = weights(32, 128), BlockFormat(4, 32, False)
    sums = [objective(w, hqq_matrix(w, fmt, HqqSettings(rounds=n))).sum() for n in (0, 1, 5, 20)]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


def test_short_last_blocks_and_zero_blocks() -> None:
    w = weights(8, 100)
    w[2] = 0
    m = hqq_matrix(w, BlockFormat(4, 32, False))
    assert np.all(dequantize(m)[2] == 0)
    assert np.linalg.norm(dequantize(m) - w) < 0.12 * np.linalg.norm(w)


def test_bad_weights_are_refused_by_name() -> None:
    w = weights(8, 64)
    w[1, 1] = np.inf
    with pytest.raises(InputRefused, match="'up' holds NaN or infinite"):
        hqq_matrix(w, BlockFormat(4, 32, False), name="up")
