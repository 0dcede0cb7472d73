"""Mislabelled versions are told from the zero points, symmetric and asymmetric, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from exporter.core.errors import InputRefused
from exporter.formats.gptq_matrix import GptqTensors
from exporter.formats.gptq_read import read_gptq
from exporter.formats.labels import Evidence, check_label, gather
from tests.unit.formats import reference

NAMES = {1: "gptq", 2: "gptq_v2"}


CASES = [(4, True), (4, False), (8, True)]


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("stored", [1, 2])
def test_the_right_label_is_read_and_the_wrong_one_refused(
    tiny: Path, tmp_path: Path, stored: int, symmetric: bool, bits: int
) -> None:
    right, wrong = NAMES[stored], NAMES[3 - stored]
    for label in (right, wrong):
        reference.write_gptq_checkpoint(
            tiny, tmp_path / label, version=stored, label=label, symmetric=symmetric, bits=bits
        )
    (tmp_path / "out").mkdir()
    found = read_gptq(tmp_path / right, tmp_path / "out")
    assert (found.scheme, found.notes) == (f"gptq-v{stored}", ())
    (tmp_path / "refused").mkdir()
    expected = (
        rf"labelled GPTQ version {3 - stored}, but its zero points are those of version {stored}.*"
        rf"scales read as version 1.*set checkpoint_format to {right}"
    )
    with pytest.raises(InputRefused, match=expected):
        read_gptq(tmp_path / wrong, tmp_path / "refused")


@pytest.mark.parametrize("stored", [1, 2])
def test_eight_asymmetric_bits_need_many_weights(tiny: Path, tmp_path: Path, stored: int) -> None:
    """One code of 256 is small against the spread of few weights: said, not judged."""
    assert _large(8, stored).version == stored
    reference.write_gptq_checkpoint(
        tiny, tmp_path / "in", version=stored, label=NAMES[3 - stored], bits=8
    )
    (tmp_path / "out").mkdir()
    try:
        notes = read_gptq(tmp_path / "in", tmp_path / "out").notes
    except InputRefused as error:
        notes = (str(error),)
    figures = (
        r"(do not tell the version, the label is trusted|are those of version).*mean weight is"
    )
    assert re.search(figures, notes[0])


@pytest.mark.parametrize("stored", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_weights_whose_mean_is_not_zero(stored: int, seed: int) -> None:
    """A tenth of a standard deviation beside zero is more than any trained matrix has."""
    evidence = _large(4, stored, seed, mean=0.1 if seed % 2 else -0.1)
    assert evidence.version in (0, stored)


def _large(bits: int, version: int, seed: int = 0, mean: float = 0.0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, 4096, generator=generator) + mean
    g_idx = torch.arange(4096) // 128
    codes, scales, zeros = reference.quantize(weight, bits, g_idx, symmetric=False)
    part = reference.gptq_pack(codes, scales, zeros, g_idx, bits, version)
    return gather([(GptqTensors(**{k: v.numpy() for k, v in part.items()}), bits)])


def test_no_label_means_version_1(tiny: Path, tmp_path: Path) -> None:
    reference.write_gptq_checkpoint(tiny, tmp_path / "v2", version=2, label=None)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match="without a label, which means GPTQ version 1"):
        read_gptq(tmp_path / "v2", tmp_path / "out")
    reference.write_gptq_checkpoint(tiny, tmp_path / "v1", version=1, label=None)
    assert read_gptq(tmp_path / "v1", tmp_path / "out").scheme == "gptq-v1"


def test_the_caller_may_know_better(tiny: Path, tmp_path: Path) -> None:
    meant = reference.write_gptq_checkpoint(tiny, tmp_path / "in", version=2, label="gptq")
    (tmp_path / "out").mkdir()
    found = read_gptq(tmp_path / "in", tmp_path / "out", version=2)
    assert found.scheme == "gptq-v2"
    assert "read as version 2 as asked" in found.notes[0]
    assert meant


@pytest.mark.parametrize("bits", [4, 8])
def test_the_offset_is_the_mean_weight_in_scales(bits: int) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    g_idx = torch.arange(64) // 32
    codes, scales, zeros = reference.quantize(weight, bits, g_idx, symmetric=False)
    part = reference.gptq_pack(codes, scales, zeros, g_idx, bits, 2)
    evidence = gather([(GptqTensors(**{k: v.numpy() for k, v in part.items()}), bits)])
    assert evidence.offset == pytest.approx(float((codes - zeros[:, g_idx]).double().mean()))
    shares = [float((zeros == (1 << (bits - 1)) + d).double().mean()) for d in (-1, 0)]
    assert [evidence.below_middle, evidence.middle] == pytest.approx(shares)


def test_figures_between_both_are_said_and_not_judged() -> None:
    between = Evidence(matrices=4, below_middle=0.1, middle=0.1, offset=0.45, error=0.01)
    assert between.version == 0
    assert "do not tell" in check_label("here", 1, between)
    assert Evidence(1, 0, 0, 0.9, 0.01).version == 1
    assert Evidence(1, 0, 0, 0.9, 0.2).version == 0
    assert Evidence(1, 0, 0, 0.1, 0.01).version == 2
