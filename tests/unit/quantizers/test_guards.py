from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from exporter.core.blocks import BlockFormat
from exporter.core.errors import MedexportError
from exporter.quantizers.guards import guard
from exporter.quantizers.rtn import quantize_matrix
from tests.unit.quantizers.correlated import weights

FMT = BlockFormat(4, 32, False)


def test_zero_blocks_and_outlier_channels_are_counted() -> None:
    w = weights(10, 64)
    w[3] = 0
    w[7, 32:] = 0
    squares = np.ones(64)
    squares[[5, 9]] = 400, 10_000

    found = guard(quantize_matrix(w, FMT, search=True), squares, of="inputs", name="q")

    assert found.document() == {
        "zero_blocks": 3,
        "outliers": {"of": "inputs", "channels": 2, "worst": 100.0},
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_bad_scale_is_an_error_by_name(value: float) -> None:
    packed = quantize_matrix(weights(4, 64), FMT, search=False)
    scales = packed.scales.copy()
    scales[1, 1] = value
    with pytest.raises(MedexportError, match=r"'q': 1 of 8 block scales"):
        guard(replace(packed, scales=scales), np.ones(64), of="weights", name="q")


def test_channels_that_are_all_zero_have_no_outliers() -> None:
    found = guard(
        quantize_matrix(np.zeros((4, 64), np.float32), FMT, search=False),
        np.zeros(64),
        of="inputs",
        name="q",
    )
    assert (found.zero_blocks, found.outliers, found.worst) == (8, 0, 0.0)
