"""A checkpoint written here read by transformers with GPTQModel's CPU kernels, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.core.blocks import dequantize
from exporter.formats.gptq_matrix import GptqTensors, from_gptq
from exporter.formats.gptq_write import GptqOptions, write_gptq
from exporter.runtimes.torch_reference import load_model
from tests.unit.formats import reference

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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_gptqmodel_packs_is_read(bits: int, symmetric: bool) -> None:
    """GPTQModel's own packer, version 2 in memory and 1 after its conversion."""
    pytest.importorskip("gptqmodel", reason="its packer is the reference")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear = torch.nn.Linear(128, 64, bias=False)
    g_idx = torch.arange(128) // 32
    codes, scales, zeros = reference.quantize(
        linear.weight.detach(), bits, g_idx, symmetric=symmetric
    )
    meant = (codes - zeros[:, g_idx]).float() * scales[:, g_idx]
    linear.weight.data = meant
    layer = TorchLinear(
        bits=bits,
        group_size=32,
        sym=symmetric,
        desc_act=False,
        in_features=128,
        out_features=64,
        bias=False,
        register_buffers=True,
    )
    layer.pack_original(linear, scales, zeros.float(), g_idx.to(torch.int32))
    parts = {n: getattr(layer, n).numpy() for n in ("qweight", "qzeros", "scales", "g_idx")}
    for version in (2, 1):
        if version == 1:
            one = 0x11111111 if bits == 4 else 0x01010101
            parts["qzeros"] = parts["qzeros"] - np.int32(one)
        packed = from_gptq(GptqTensors(**parts), bits, version, symmetric=symmetric)
        assert packed is not None
        assert np.array_equal(dequantize(packed), meant.numpy())
