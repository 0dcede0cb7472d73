"""The packed layout and the plain codes against onnxruntime: its kernels and its own quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.quantizers.rtn import quantize_matrix

SHAPES = [(40, 96, 32), (33, 100, 32), (24, 72, 16), (16, 960, 128), (8, 960, 64)]


def weights(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_t(5, (rows, columns)).astype(np.float32)


def run_node(
    op: str, first: str, feed: NDArray[Any], qdata: NDArray[Any], m: PackedMatrix, **attributes: int
) -> NDArray[np.float32]:
    """One contrib node over a packed matrix; `first` names the fed input's place."""
    stored = {"b": qdata, "s": m.scales.astype(np.float32)}
    if m.zero_points is not None:
        stored["z"] = m.zero_points
    names = ["x", *stored] if first == "left" else ["b", "x", *list(stored)[1:]]
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, list(feed.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": feed})[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_matmulnbits_multiplies_by_the_dequantized_matrix(
    rows: int, columns: int, block: int, bits: int, symmetric: bool
) -> None:
    m = quantize_matrix(weights(rows, columns), BlockFormat(bits, block, symmetric), search=True)
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}

    y = run_node("MatMulNBits", "left", x, m.qdata, m, accuracy_level=0, **sizes)

    expected = x.astype("f8") @ dequantize(m).T.astype("f8")
    np.testing.assert_allclose(y, expected, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gatherblockquantized_looks_up_dequantized_rows(bits: int, symmetric: bool) -> None:
    m = quantize_matrix(weights(30, 96), BlockFormat(bits, 32, symmetric), search=True)
    ids = np.array([[3, 0, 29], [7, 7, 1]])
    axes = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": 32}

    y = run_node("GatherBlockQuantized", "second", ids, m.qdata.reshape(30, -1), m, **axes)

    assert np.array_equal(y, dequantize(m)[ids])


def exact_ranges(rows: int, columns: int, fmt: BlockFormat) -> NDArray[np.float32]:
    """Random blocks whose plain scale is a power of two, which float16 holds exactly."""
    rng = np.random.default_rng(3)
    w = rng.uniform(-1, 1, (rows, columns // fmt.block, fmt.block)).astype(np.float32)
    scale = np.float32(2.0) ** rng.integers(-9, -3, (rows, columns // fmt.block))
    low = (
        np.full_like(scale, fmt.middle) if fmt.symmetric else rng.integers(1, fmt.top, scale.shape)
    )
    high = fmt.top - low
    if fmt.symmetric:  # onnxruntime divides the value of largest magnitude by -middle
        high = high - 1
    w *= (np.minimum(low, high) * scale)[..., None]
    w[..., 3], w[..., 11] = -low * scale, high * scale
    return w.reshape(rows, columns)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_plain_codes_equal_onnxruntimes_bit_for_bit(bits: int, symmetric: bool) -> None:
    fmt, rows, columns = BlockFormat(bits, 32, symmetric), 24, 128
    w = exact_ranges(rows, columns, fmt)
    blocks = columns // 32
    qdata = np.zeros((rows, blocks, 32 * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * (blocks * bits // 8), np.uint8)
    quantize = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    quantize(qdata, np.ascontiguousarray(w.T), scales, zeros, 32, rows, columns, symmetric)

    ours = quantize_matrix(w, fmt, search=False)

    assert np.array_equal(ours.scales.ravel().astype(np.float32), scales)
    assert np.array_equal(ours.qdata, qdata)
    if ours.zero_points is not None:
        assert np.array_equal(ours.zero_points.ravel(), zeros)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("skew", [0.0, 0.5])
def test_the_search_never_loses_more_than_onnxruntime(
    block: int, symmetric: bool, skew: float
) -> None:
    rows, columns = 48, 384
    w = weights(rows, columns) + np.float32(skew)
    blocks = columns // block
    qdata = np.zeros((rows, blocks, block // 2), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * (-(-blocks // 2)), np.uint8)
    native.quantize_matmul_4bits(
        qdata, np.ascontiguousarray(w.T), scales, zeros, block, rows, columns, symmetric
    )
    # The scales as float16 would hold them cost onnxruntime at most what rounding them costs us.
    theirs = PackedMatrix(
        BlockFormat(4, block, symmetric),
        columns,
        qdata,
        scales.reshape(rows, blocks).astype(np.float16),
        None if symmetric else zeros.reshape(rows, -1),
    )
    exact = dequantize(theirs).reshape(rows, blocks, block)
    with np.errstate(invalid="ignore"):
        exact *= (scales.reshape(rows, blocks) / theirs.scales.astype(np.float32))[..., None]

    ours = quantize_matrix(w, BlockFormat(4, block, symmetric), search=True)

    def lost(values: NDArray[np.float32]) -> NDArray[np.float64]:
        return (
            np.square((values.reshape(rows, columns) - w).astype("f8"))
            .reshape(rows, blocks, block)
            .sum(-1)
        )

    assert np.all(lost(dequantize(ours)) <= lost(dequantize(theirs)) * (1 + 1e-5))
    assert lost(dequantize(ours)).sum() < 0.96 * lost(exact).sum()
    assert (ours.scales < 0).any() == symmetric  # both signs are in use
