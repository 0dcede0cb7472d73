"""Float16 arithmetic in the standard dialect: what stays in float32, and that all stays finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.blocks import BlockFormat
from exporter.core.errors import WrongUsage
from exporter.graphs import writer
from exporter.graphs.export import export_model
from exporter.graphs.standard.examples import drawn_images, example_feeds
from exporter.graphs.standard.float16 import to_float16
from exporter.graphs.standard.operators import require_supported
from exporter.graphs.standard.ranges import beyond_float16
from exporter.runtimes.ort import OrtCaptioner
from tests.support.tiny_llava import write_tiny_llava

from .conftest import Decoder, Model, make_model, relative, save, session, text_logits
from .packing import quantize_folder
from .test_decoder import tokens
from .test_quantized import TEXT, load, matrices
from .test_tower import features, tiles

Out = Callable[[str], Path]
# Measured: 2e-3 with the largest weights below; float16 has 11 bits, 5e-4.
TOLERANCE = 1e-2
DECODER = Path("model/onnx/decoder_model_merged.onnx")


class HalfDecoder(Decoder):
    """The same with a past in the type of the graph."""

    def empty(self, batch: int) -> list[np.ndarray]:
        kinds = {i.name: i.type for i in self.decoder.get_inputs()}
        wanted = [np.float16 if "16" in kinds[n] else np.float32 for n in self.past_names]
        return [p.astype(k) for p, k in zip(super().empty(batch), wanted, strict=True)]


def scaled(factors: dict[str, float], **text: Any) -> Model:
    """A random model with some weights of its second layer, by their last name, times a factor; all
    matrices are what float16 stores.
    """
    model = make_model(text, {})
    layer = model.model.text_model.layers[1]
    with torch.no_grad():
        for name, factor in factors.items():
            layer.get_submodule(name).weight.mul_(factor)
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.copy_(parameter.half())
        assert max(float(p.abs().max()) for p in model.parameters()) < 65504
    return model


def exported(model: Model, root: Path, name: str = "e") -> tuple[Path, dict[str, Any]]:
    """The export in float16 arithmetic, and export.json's part about the dialect."""
    out = root / name
    out.mkdir()
    export_model(save(model, root / f"{name}-source"), out, dialect="standard", compute="float16")
    found: dict[str, Any] = json.loads((out / "export.json").read_text())["standard"]
    return out, found


def decoder_feed(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of the decoder graph of an export, with an empty past."""
    decoder = HalfDecoder(folder / "model")
    return {
        "inputs_embeds": decoder.embed.run(None, {"input_ids": ids})[0],
        "attention_mask": np.ones(ids.shape, np.int64),
        "num_logits_to_keep": np.array(0, np.int64),
        **dict(zip(decoder.past_names, decoder.empty(len(ids)), strict=True)),
    }


def by_definition(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of the decoder graph as onnx's reference implementation computes them, type by type."""
    run = ReferenceEvaluator(str(folder / DECODER)).run
    logits: np.ndarray = run(["logits"], decoder_feed(folder, ids))[0]
    return logits


def largest_up(model: Model, ids: np.ndarray) -> float:
    """The largest value behind the second layer's up projection, by torch."""
    seen: list[float] = []
    hook = model.model.text_model.layers[1].mlp.up_proj.register_forward_hook(
        lambda *call: seen.append(float(call[-1].abs().max()))
    )
    text_logits(model, ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("inline", [True, False])
def test_a_layer_that_overflows_stays_in_float32(
    inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not inline:
        monkeypatch.setattr(writer, "INLINE_LIMIT", 0)
    model = scaled({"mlp.up_proj": 2e5, "mlp.down_proj": 1e-3})
    out, found = exported(model, tmp_path)
    kept = found["kept_float32"]["decoder_model_merged"]
    assert kept["layers.1.up"].startswith("reaches ")
    assert kept["layers.1.up"].endswith("float16 ends at 65504")
    assert kept["layers.1.down"] == "reads what 'layers.1.gated' gives"
    assert not [name for name in kept if not name.startswith("layers.1.")]
    ids = tokens(4, 2, 11)
    assert largest_up(model, ids) > 65504
    logits, _ = HalfDecoder(out / "model").run(ids)
    assert np.isfinite(logits).all()
    assert relative(logits, text_logits(model, ids)) < TOLERANCE
    assert found["float16_difference"]["decoder_model_merged"] < TOLERANCE
    # onnx's own implementation rounds behind every operator, which onnxruntime's on a CPU does not.
    assert relative(by_definition(out, ids), text_logits(model, ids)) < TOLERANCE
    # Without the finding the same graph does overflow.
    plain = tmp_path / "plain"
    plain.mkdir()
    export_model(tmp_path / "e-source", plain, dialect="standard")
    assert to_float16(plain / DECODER, {}) == {}
    with np.errstate(all="ignore"):
        assert not np.isfinite(by_definition(plain, ids)).all()
    feeds = [decoder_feed(plain, ids)]
    wide = beyond_float16(plain / DECODER, feeds, kind=TensorProto.FLOAT16)
    assert (wide[0].node, wide[0].largest) == ("layers.1.up", np.inf)


def test_an_ordinary_model_computes_in_float16(tmp_path: Path) -> None:
    model = scaled({})
    out, found = exported(model, tmp_path)
    assert found["compute"] == "float16"
    assert not any(found["kept_float32"].values())
    path = out / DECODER
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    onnx.checker.check_model(onnx.load(path), full_check=True)
    kinds = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    by_operator = {
        op: {kinds[i] for n in graph.node if n.op_type == op for i in n.input if i in kinds}
        for op in ("MatMul", "Softmax", "ReduceMean", "Sigmoid", "CumSum")
    }
    half, full = {TensorProto.FLOAT16}, {TensorProto.FLOAT}
    assert by_operator["MatMul"] == by_operator["Sigmoid"] == half
    assert by_operator["Softmax"] == full
    assert full < by_operator["ReduceMean"] | full and half != by_operator["ReduceMean"]
    faces = {v.name: kinds[v.name] for v in (*graph.input, *graph.output)}
    assert faces["inputs_embeds"] == faces["logits"] == TensorProto.FLOAT
    cached = {k for n, k in faces.items() if n.startswith(("past_", "present."))}
    assert cached == half
    # No weight is read through a Cast.
    stored = {t.name for t in graph.initializer}
    assert not [n.name for n in graph.node if n.op_type == "Cast" and n.input[0] in stored]
    assert require_supported(path) == found["operators"]["decoder_model_merged"]


def test_prefill_and_decode_equal_torch(tmp_path: Path) -> None:
    model = scaled({}, num_attention_heads=4, num_key_value_heads=1)
    decoder, ids = HalfDecoder(exported(model, tmp_path)[0] / "model"), tokens(5, 2, 20)
    logits, past = decoder.run(ids[:, :9])
    rows = [logits]
    for start, stop in ((9, 10), (10, 20)):
        logits, past = decoder.run(ids[:, start:stop], past=past)
        assert past[0].dtype == np.float16
        rows.append(logits)
    assert relative(np.concatenate(rows, 1), text_logits(model, ids)) < TOLERANCE


def test_keys_that_overflow_keep_the_cache_in_float32(tmp_path: Path) -> None:
    model = scaled({"self_attn.k_proj": 2e5, "self_attn.q_proj": 1e-3})
    out, found = exported(model, tmp_path)
    kept = found["kept_float32"]["decoder_model_merged"]
    assert "layers.1.key" in kept
    decoder, ids = HalfDecoder(out / "model"), tokens(6, 1, 12)
    logits, past = decoder.run(ids)
    assert {p.dtype for p in past} == {np.dtype(np.float32)}
    assert np.isfinite(logits).all()
    assert float(np.abs(past[2]).max()) > 65504


@pytest.mark.parametrize("form", [BlockFormat(8, 32, True), BlockFormat(4, 64, True)])
def test_packed_matrices_are_read_in_float16(form: BlockFormat, tmp_path: Path, out: Out) -> None:
    model = make_model({**TEXT, "vocab_size": 102}, {}, tied=True)
    source = save(model, tmp_path / "m")
    formats = {n: form for n in matrices(model) if n != "lm_head.weight"}
    load(model, quantize_folder(source, tmp_path / "q", formats))
    export_model(tmp_path / "q", out("e"), dialect="standard", compute="float16")
    ids, pixels = np.random.default_rng(1).integers(0, 100, (2, 11)), tiles(model, 1, 1, 2)
    folder = tmp_path / "e" / "model"
    assert relative(HalfDecoder(folder).run(ids)[0], text_logits(model, ids)) < TOLERANCE
    seen = session(folder, "vision_encoder").run(None, {"pixel_values": pixels})[0]
    assert relative(seen, features(model, pixels)) < TOLERANCE
    graph = onnx.load(folder / "onnx" / "decoder_model_merged.onnx").graph
    made = {o: n.op_type for n in graph.node for o in n.output}
    weights = [
        n.input[1] for n in graph.node if n.op_type == "MatMul" and ".attention" not in n.name
    ]
    assert {made[w] for w in weights} <= {"DequantizeLinear", "Slice"}


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    model = scaled({"mlp.up_proj": 2e5, "mlp.down_proj": 1e-3})
    first, second = (exported(model, tmp_path, name)[0] for name in "ab")
    assert (first / "export.json").read_bytes() == (second / "export.json").read_bytes()
    for path in sorted((first / "model" / "onnx").iterdir()):
        assert path.read_bytes() == (second / "model" / "onnx" / path.name).read_bytes()


def test_example_feeds_are_what_the_runtime_feeds(tmp_path: Path, out: Out) -> None:
    base = write_tiny_llava(tmp_path / "base", kind="llava_next", decoder="mistral")
    merge_adapters(base, [], out("m"))
    export_model(tmp_path / "m", out("e"), dialect="standard", float_storage="float32")
    folder = tmp_path / "e" / "model"
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (70, 90, 3), np.uint8))
    feeds = example_feeds(folder, [image], "Describe")
    assert {name: len(found) for name, found in feeds.items()} == {
        "vision_encoder": 1,
        "embed_tokens": 1,
        "decoder_model_merged": 1,
    }
    logits = session(folder, "decoder_model_merged").run(
        ["logits"], dict(feeds["decoder_model_merged"][0])
    )[0]
    expected = OrtCaptioner(folder, threads=1).score(image, "Describe", [])
    assert relative(logits[0, -1:], expected) < 1e-5
    assert len(example_feeds(folder, drawn_images(), "Describe")["decoder_model_merged"]) == 3


def test_what_cannot_be_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="float16 is for the standard dialect"):
        export_model(save(make_model({}, {}), tmp_path / "m"), tmp_path, compute="float16")
    with pytest.raises(WrongUsage, match="reads float16 weights, not float32"):
        export_model(
            tmp_path / "m", tmp_path, dialect="standard", compute="float16", float_storage="float32"
        )
