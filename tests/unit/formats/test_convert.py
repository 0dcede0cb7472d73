"""`medexport convert`: there and back, notes on stdout, one-line refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from exporter.cli.formats import convert
from exporter.core.errors import InputRefused, WrongUsage
from exporter.runtimes.weights import float_tensors
from tests.unit.formats import reference


def run(*arguments: object) -> str:
    result = CliRunner().invoke(
        convert, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False
    )
    return result.stdout


def test_there_and_back(quantized: Path, tmp_path: Path) -> None:
    told = run(quantized, "--to", "gptq-v2", "--only-decoder", "--out", tmp_path / "gptq")
    assert "14 matrices quantized as gptq-v2" in told
    assert "is float16: outside the decoder's blocks (--only-decoder)" in told
    run(tmp_path / "gptq", "--to", "medexport", "--out", tmp_path / "back")
    ours, back = dict(float_tensors(quantized)), dict(float_tensors(tmp_path / "back"))
    assert ours.keys() == back.keys()
    for name, values in ours.items():
        same = values if ".text_model.layers." in name else values.astype(np.float16)
        assert np.array_equal(back[name], same), name


def test_a_refusal_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    reference.write_gptq_checkpoint(tiny, tmp_path / "in", version=2, label="gptq")
    with pytest.raises(InputRefused, match="zero points are those of version 2"):
        run(tmp_path / "in", "--to", "medexport", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arguments = (tmp_path / "in", "--to", "medexport", "--gptq-version", 2)
    assert "note: read as version 2 as asked" in run(*arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ("--to", "medexport", "--only-decoder"),
        ("--to", "gptq", "--from", "awq"),
        ("--to", "gptq", "--gptq-version", "1"),
        ("--to", "bnb-nf4", "--only-decoder"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(WrongUsage, match="belong"):
        run(tmp_path, *options, "--out", tmp_path / "out")
