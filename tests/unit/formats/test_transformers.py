"""A checkpoint written here, loaded by transformers with GPTQModel's kernels on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter.formats.gptq_write import GptqOptions, write_gptq
from exporter.runtimes.torch_reference import load_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["int4-rtn", "int8"])
@pytest.mark.parametrize("version", [1, 2])
def test_logits_are_ours(tiny: Path, out: Path, tmp_path: Path, scheme: str, version: int) -> None:
    pytest.importorskip("gptqmodel", reason="transformers reads GPTQ through GPTQModel")
    pytest.importorskip("optimum", reason="transformers reads GPTQ through optimum")
    from transformers import Idefics3ForConditionalGeneration

    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme

    if (scheme, version) == ("int4-rtn", 1):
        pytest.skip("GPTQModel reads asymmetric version 1 only if it wrote it")
    folder = tmp_path / "quantized"
    folder.mkdir()
    quantize_model(tiny, folder, find_scheme(scheme), threads=1)
    write_gptq(folder, out, GptqOptions(version=version, only_decoder=True))
    ours = load_model(folder, json.loads((folder / "config.json").read_text()))
    with torch.no_grad():  # what GPTQ has in float16, we compare in float16
        known = dict(ours.named_parameters())
        for name, values in load_file(out / "model.safetensors").items():
            if name in known:
                known[name].copy_(values.float())
    theirs = Idefics3ForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    kinds = {type(m).__name__ for m in theirs.model.text_model.layers.modules()}
    assert "Linear" not in kinds
    ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    # Their kernels round scaled weights to float16.
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())
