"""nf4 and int8 as bitsandbytes has them: bytes, graphs, and checkpoints for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from PIL import Image

from exporter.core.blocks import dequantize
from exporter.core.errors import InputRefused
from exporter.core.nf4 import dequantize_nf4, quantize_nf4
from exporter.formats.bnb_write import write_bnb
from exporter.graphs.linear import linear
from exporter.graphs.writer import GraphWriter
from exporter.quantizers.bnb import int8_rows
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.torch_reference import load_model
from exporter.runtimes.weights import float_tensors


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 192), (48, 32)])
@pytest.mark.parametrize("length", [1, 7])
def test_onnxruntime_multiplies_by_the_dequantized_matrix(
    tmp_path: Path, rows: int, columns: int, length: int
) -> None:
    rng = np.random.default_rng(rows + columns)
    matrix = quantize_nf4(rng.normal(size=(rows, columns)).astype(np.float32))
    with GraphWriter(tmp_path, "one") as writer:
        x = writer.input("x", TensorProto.FLOAT, ["batch", "length", columns])
        out = writer.output("y", TensorProto.FLOAT, ["batch", "length", rows])
        linear(writer, "linear", x, matrix, 4, output=out)
        writer.finish()
    ops = [n.op_type for n in onnx.load(tmp_path / "one.onnx").graph.node]
    assert ops == ["MatMulBnb4"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        tmp_path / "one.onnx", options, providers=["CPUExecutionProvider"]
    )
    values = rng.normal(size=(2, length, columns)).astype(np.float32)
    expected = values @ dequantize_nf4(matrix).T
    assert np.allclose(session.run(None, {"x": values})[0], expected, rtol=1e-4, atol=1e-4)


def test_int8_is_the_papers_formula() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    weight[3] = 0
    found = dequantize(int8_rows(weight, 32))
    for row, values in zip(found, weight, strict=True):
        absmax = np.abs(values).max()
        step = np.float32(np.float16(absmax / np.float32(127)))
        codes = np.rint(values * (127 / absmax)) if absmax else np.zeros(64)
        assert np.allclose(row, codes * step, rtol=0, atol=1e-7)
        assert np.abs(row - values).max() <= 0.51 * absmax / 127 + 1e-3 * absmax


def test_int8_has_bitsandbytes_codes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).half()
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    ours = int8_rows(weight.float().numpy(), 128)
    assert np.array_equal(ours.qdata.reshape(32, 128).astype(int) - 128, codes.numpy().astype(int))
    assert np.allclose(ours.scales[:, 0], scales.numpy() / 127, rtol=5e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_graphs_say_what_torch_says(tiny: Path, out: Path, tmp_path: Path, kind) -> None:
    from exporter.graphs.export import export_model
    from exporter.runtimes.ort import OrtCaptioner
    from exporter.runtimes.torch_reference import TorchCaptioner

    found = quantize_model(tiny, out, find_scheme(f"bnb-{kind}"), threads=1)
    report = json.loads((out / "quantization.json").read_text())
    assert len(report["layers"]) == 2 * 7 + 2 * 6 + 1
    assert {e["method"] for e in report["layers"]} == {f"bnb-{kind}"}
    limits = {"nf4": (0.05, 0.13), "int8": (0.003, 0.012)}[kind]
    assert all(limits[0] < e["relative_error"] < limits[1] for e in report["layers"])
    stored = (out / "model.safetensors").stat().st_size
    assert (
        sum(e["bytes"] for part in ("layers", "floats") for e in report[part]) == found.stored_bytes
    )
    assert found.stored_bytes < stored < found.stored_bytes + 40_000
    (tmp_path / "exported").mkdir()
    exported = export_model(out, tmp_path / "exported", accuracy_level=0)
    assert {exported.bits[e["name"]] for e in report["layers"]} == {4 if kind == "nf4" else 8}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    ours = OrtCaptioner(tmp_path / "exported/model", threads=1).score(image, "Describe.", [5, 6, 7])
    theirs = TorchCaptioner(out, threads=1).score(image, "Describe.", [5, 6, 7])
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


def test_quantized_folders_are_refused(quantized: Path, out: Path) -> None:
    with pytest.raises(InputRefused, match="already quantized"):
        quantize_model(quantized, out, find_scheme("bnb-nf4"), threads=1)
    with pytest.raises(InputRefused, match="stored in 8 bits as integers; bitsandbytes holds NF4"):
        write_bnb(quantized, out)


def test_transformers_reads_it_with_bitsandbytes(tiny: Path, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import Idefics3ForConditionalGeneration

    (tmp_path / "nf4").mkdir()
    quantize_model(tiny, tmp_path / "nf4", find_scheme("bnb-nf4"), threads=1)
    written = write_bnb(tmp_path / "nf4", out)
    theirs = Idefics3ForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    kinds = [type(m).__name__ for m in theirs.modules()]
    assert kinds.count("Linear4bit") == len(written.quantized)
    config = json.loads((tmp_path / "nf4/config.json").read_text())
    ours = load_model(tmp_path / "nf4", config)
    ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert float((found - expected).abs().max()) < 5e-3 * float(expected.abs().max())


def test_codes_and_maxima_are_taken_over(tiny: Path, out: Path, tmp_path: Path) -> None:
    """By bitsandbytes' layout: JSON state, high half first, 16 values, one maximum per 64."""
    from safetensors.torch import load_file

    (tmp_path / "nf4").mkdir()
    quantize_model(tiny, tmp_path / "nf4", find_scheme("bnb-nf4"), threads=1)
    written = write_bnb(tmp_path / "nf4", out)
    tensors, ours = load_file(out / "model.safetensors"), dict(float_tensors(tmp_path / "nf4"))
    for name in written.quantized:
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].numpy()))
        codes = tensors[name].flatten().long()
        values = tensors[f"{name}.quant_map"][torch.stack((codes >> 4, codes & 15), 1).flatten()]
        values = values * tensors[f"{name}.absmax"].repeat_interleave(state["blocksize"])
        assert np.array_equal(values.reshape(state["shape"]).numpy(), ours[name])
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"]
