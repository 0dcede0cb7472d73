"""AWQ checkpoints written by the reference come in value for value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.core.errors import InputRefused, WrongUsage
from exporter.formats.read import read_checkpoint
from exporter.runtimes.weights import float_tensors
from tests.unit.formats import reference


@pytest.mark.parametrize("group", [16, 32, 64, -1])
def test_weights_are_those_that_are_meant(
    tiny: Path, out: Path, tmp_path: Path, group: int
) -> None:
    meant = reference.write_awq_checkpoint(
        tiny, tmp_path / "in", group=1 << 16 if group == -1 else group, group_size=group
    )
    found = read_checkpoint(tmp_path / "in", out)
    assert (found.scheme, found.notes) == ("awq", ())
    weights = dict(float_tensors(out))
    for name, weight in meant.items():
        assert np.array_equal(weights[name], weight.numpy())
    assert weights.keys() == load_file(tiny / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "AWQ with 8 bits"),
        ({"version": "gemv"}, "packing 'gemv' of awq; medexport reads gemm"),
        ({"group_size": 64}, "has groups of 32; the settings say 64"),
    ],
)
def test_hostile_settings(tiny: Path, out: Path, tmp_path: Path, settings, message: str) -> None:
    reference.write_awq_checkpoint(tiny, tmp_path / "in", group=32, **settings)
    with pytest.raises(InputRefused, match=message):
        read_checkpoint(tmp_path / "in", out)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qzeros", lambda t: t[:, :-1].contiguous(), "do not fit"),
        ("scales", lambda t: t[:, :-1].contiguous(), "do not fit"),
        ("scales", lambda t: torch.full_like(t, float("nan")), "NaN or infinity"),
        ("scales", lambda t: t[0], r"expected \[K, N/8\]"),
        ("qweight", lambda t: t.long(), "is I64; expected I32"),
    ],
)
def test_hostile_parts(tiny: Path, out: Path, tmp_path: Path, part, change, message: str) -> None:
    meant = reference.write_awq_checkpoint(tiny, tmp_path / "in")
    path, name = tmp_path / "in/model.safetensors", min(meant).removesuffix("weight") + part
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path)
    with pytest.raises(InputRefused, match=message):
        read_checkpoint(tmp_path / "in", out)


def test_folders_that_are_neither(tiny: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="expected a GPTQ or AWQ checkpoint"):
        read_checkpoint(tiny, out)
    with pytest.raises(InputRefused, match="no such folder"):
        read_checkpoint(tmp_path / "nowhere", out)
    reference.write_awq_checkpoint(tiny, tmp_path / "in")
    with pytest.raises(InputRefused, match="a awq checkpoint; expected gptq"):
        read_checkpoint(tmp_path / "in", out, origin="gptq")
    with pytest.raises(WrongUsage, match="is AWQ"):
        read_checkpoint(tmp_path / "in", out, version=1)
