"""One matrix to GPTQ tensors and back, against the reference's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import InputRefused
from exporter.formats.gptq_matrix import (
    GptqTensors,
    check_tensors,
    dequantize_gptq,
    from_gptq,
    to_gptq,
)
from exporter.formats.words import pack_bytes
from tests.unit.formats import reference


def random_matrix(
    seed: int, rows: int, blocks: int, fmt: BlockFormat, lowest_zero: int = 1
) -> PackedMatrix:
    """Random codes; zero points from `lowest_zero`."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, fmt.top + 1, (rows, blocks, fmt.block), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.1, (rows, blocks)).astype(np.float16)
    zeros = rng.integers(lowest_zero, fmt.top + 1, (rows, blocks), dtype=np.uint8)
    packed_zeros = None if fmt.symmetric else pack_bytes(zeros, fmt.bits)
    columns = blocks * fmt.block
    return PackedMatrix(fmt, columns, pack_bytes(codes, fmt.bits), scales, packed_zeros)


FORMATS = st.builds(
    BlockFormat, st.sampled_from((4, 8)), st.sampled_from((16, 32, 64)), st.booleans()
)


@settings(deadline=None, max_examples=40)
@given(FORMATS, st.integers(1, 2), st.integers(1, 3), st.sampled_from((1, 2)), st.integers(0, 9999))
def test_every_value_survives(
    fmt: BlockFormat, words: int, pairs: int, version: int, seed: int
) -> None:
    matrix = random_matrix(seed, 32 * words, 2 * pairs, fmt)
    tensors = to_gptq(matrix, version)
    meant = reference.gptq_weights(as_torch(tensors), fmt.bits, version).numpy()
    assert np.array_equal(meant, dequantize(matrix))
    back = from_gptq(tensors, fmt.bits, version, symmetric=fmt.symmetric)
    assert back is not None
    assert back.format == fmt
    assert np.array_equal(back.qdata, matrix.qdata)
    assert np.array_equal(back.scales, matrix.scales)
    if matrix.zero_points is not None:
        assert np.array_equal(back.zero_points, matrix.zero_points)
    assert np.array_equal(dequantize_gptq(tensors, fmt.bits, version), dequantize(matrix))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from((4, 8)), st.sampled_from((1, 2)), st.integers(0, 9999))
def test_any_g_idx_dequantizes_as_the_formula_says(bits: int, version: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    g_idx = torch.randint(0, 3, (64,), generator=generator)
    weight = torch.randn(32, 64, generator=generator)
    codes, scales, zeros = reference.quantize(weight, bits, g_idx, symmetric=False)
    part = reference.gptq_pack(codes, scales, zeros, g_idx, bits, version)
    tensors = GptqTensors(**{k: v.numpy() for k, v in part.items()})
    expected = reference.gptq_weights(part, bits, version).numpy()
    assert np.array_equal(dequantize_gptq(tensors, bits, version), expected)
    assert from_gptq(tensors, bits, version, symmetric=False) is None


@pytest.mark.parametrize(
    ("group", "columns", "block"), [(512, 1024, 256), (96, 192, 32), (64, 96, 64)]
)
def test_groups_of_other_lengths_keep_their_values(group: int, columns: int, block: int) -> None:
    g_idx = torch.arange(columns) // group
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(1))
    codes, scales, zeros = reference.quantize(weight, 4, g_idx, symmetric=False)
    part = reference.gptq_pack(codes, scales, zeros, g_idx, 4, 2)
    packed = from_gptq(
        GptqTensors(**{k: v.numpy() for k, v in part.items()}), 4, 2, symmetric=False
    )
    assert packed is not None
    assert packed.format.block == block
    assert np.array_equal(dequantize(packed), reference.gptq_weights(part, 4, 2).numpy())


def test_a_group_without_a_block_of_ours_is_not_packed() -> None:
    g_idx = np.arange(64, dtype=np.int32) // 8
    tensors = GptqTensors(
        np.zeros((8, 32), np.int32), np.zeros((8, 4), np.int32), np.ones((8, 32), np.float16), g_idx
    )
    assert from_gptq(tensors, 4, 2, symmetric=False) is None


def test_version_1_has_no_zero_point_0() -> None:
    matrix = random_matrix(0, 32, 2, BlockFormat(4, 32, False), lowest_zero=0)
    with pytest.raises(InputRefused, match=r"of 64 zero points are 0.*gptq-v2"):
        to_gptq(matrix, 1, "q_proj")
    assert np.array_equal(
        reference.gptq_weights(as_torch(to_gptq(matrix, 2)), 4, 2).numpy(), dequantize(matrix)
    )


def test_rows_that_fill_no_words_are_refused() -> None:
    with pytest.raises(InputRefused, match=r"\[40, 64\].*multiples of 32"):
        to_gptq(random_matrix(0, 40, 2, BlockFormat(4, 32, True)), 2)


def test_half_a_block_is_refused() -> None:
    matrix = random_matrix(0, 32, 2, BlockFormat(4, 32, True))
    short = PackedMatrix(matrix.format, 48, matrix.qdata, matrix.scales, None)
    with pytest.raises(InputRefused, match="whole blocks"):
        to_gptq(short, 2)


def test_sym_that_is_not_is_refused() -> None:
    tensors = to_gptq(random_matrix(0, 32, 2, BlockFormat(4, 32, False)), 2)
    with pytest.raises(InputRefused, match=r"settings say sym, but .* are not 8"):
        from_gptq(tensors, 4, 2, symmetric=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qweight": np.zeros((7, 32), np.int32)},
            r"qweight' has shape \[7, 32\]; expected \[8, 32\]",
        ),
        ({"qzeros": np.zeros((2, 3), np.int32)}, r"qzeros' has shape"),
        ({"scales": np.ones(32, np.float16)}, r"scales' has shape \[32\]; expected \[groups, 32\]"),
        ({"g_idx": np.zeros(63, np.int32)}, r"g_idx' has shape \[63\]; expected \[64\]"),
        ({"g_idx": np.full(64, 2, np.int32)}, r"holds groups 2 to 2; there are 2"),
        ({"g_idx": np.full(64, -1, np.int32)}, r"holds groups -1 to -1"),
        ({"scales": np.full((2, 32), np.nan, np.float16)}, "NaN or infinity"),
    ],
)
def test_hostile_tensors(change: dict[str, np.ndarray], message: str) -> None:
    parts = {
        "qweight": np.zeros((8, 32), np.int32),
        "qzeros": np.zeros((2, 4), np.int32),
        "scales": np.ones((2, 32), np.float16),
        "g_idx": np.arange(64, dtype=np.int32) // 32,
    }
    check_tensors(GptqTensors(**parts), 4, 32, 64, "m")
    with pytest.raises(InputRefused, match=message):
        check_tensors(GptqTensors(**(parts | change)), 4, 32, 64, "m")


def as_torch(tensors: GptqTensors) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.from_numpy(tensors.qweight),
        "qzeros": torch.from_numpy(tensors.qzeros),
        "scales": torch.from_numpy(tensors.scales),
        "g_idx": torch.from_numpy(tensors.g_idx),
    }
