"""Graphs in float16 arithmetic: near the float32 ones, and what cannot be turned is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.graphs.export import export_model
from exporter.graphs.half import MASKED, halve_export, halve_graph
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.family_cases import CASES, FamilyCase

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass
class Built:
    case: FamilyCase
    merged: Path
    float32: Path
    half: Path


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("half")
    for name in ("merged", "float32"):
        (root / name).mkdir()
    merge_adapters(request.param.write(root / "base"), [], root / "merged")
    export_model(root / "merged", root / "float32")
    shutil.copytree(root / "float32", root / "half")
    halve_export(root / "half")
    return Built(request.param, root / "merged", root / "float32", root / "half")


def graphs(exported: Path) -> dict[str, onnx.ModelProto]:
    return {p.stem: onnx.load(p) for p in sorted((exported / "model" / "onnx").glob("*.onnx"))}


def picture() -> Image.Image:
    small = np.random.default_rng(7).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((60, 45), Image.Resampling.BICUBIC)


def test_logits_are_those_of_torch_within_float16(built: Built) -> None:
    reference = TorchCaptioner(built.merged, threads=1)
    halved = OrtCaptioner(built.half / "model", threads=1)
    prompt = "" if reference.preparer.image_token_id is None else "Describe."
    tokens = reference.caption(picture(), prompt, 12).tokens
    expected = reference.score(picture(), prompt, tokens)
    found = halved.score(picture(), prompt, tokens)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    # float16 has 11 bits: 5e-4 for one product; measured up to 0.0016 over these depths.
    assert 0 < error < 0.005
    assert found.dtype == np.float32


def test_nothing_but_borders_and_angles_is_float32(built: Built) -> None:
    for name, model in graphs(built.half).items():
        graph = model.graph
        casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast"}
        turning = {i for n in graph.node if n.op_type in ("Cos", "Sin") for i in n.input}
        makers = {o: n for n in graph.node for o in n.output}
        angles = [makers[i] for i in turning]
        near = {i for n in angles for i in n.input}
        for tensor in graph.initializer:
            assert tensor.data_type != FLOAT or tensor.name in near, f"{name}: {tensor.name}"
        for out in graph.output:
            kind = out.type.tensor_type.elem_type
            if out.name.startswith(("present.", "cross_")):
                assert kind == HALF
            else:
                assert kind == FLOAT
                assert casts[out.name].attribute[0].i == FLOAT
        for given in graph.input:
            if given.name.startswith(("past_", "cross_")):
                assert given.type.tensor_type.elem_type == HALF


def test_stored_weights_stay_as_they_are(built: Built) -> None:
    """Byte for byte, under the same names, without the Cast that was behind them."""
    before, after = graphs(built.float32), graphs(built.half)
    for name, model in before.items():
        old = {t.name: t for t in model.graph.initializer}
        new = {t.name: t for t in after[name].graph.initializer}
        assert old.keys() == new.keys()
        halves = [n for n, t in old.items() if t.data_type == HALF]
        for tensor in halves:
            pair = [numpy_helper.to_array(x[tensor]) for x in (old, new)]
            assert np.array_equal(*pair)
        behind = [n for n in after[name].graph.node if n.op_type == "Cast" and n.input[0] in halves]
        assert not behind


def test_the_export_says_so_and_only_once(built: Built, tmp_path: Path) -> None:
    record = json.loads((built.half / "export.json").read_text())
    assert record["compute"] == "float16"
    assert "compute" not in json.loads((built.float32 / "export.json").read_text())
    # Turning again changes nothing but the record's order of events: there is no float32 left.
    shutil.copytree(built.half, tmp_path / "again")
    assert [g.tensors for g in halve_export(tmp_path / "again")] == [0, 0, 0]


def test_another_dialect_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps({"dialect": "standard"}))
    with pytest.raises(InputRefused, match="'standard'"):
        halve_export(tmp_path)


def one_node(path: Path, op: str, weight: NDArray[np.float32], *, external: bool = False) -> Path:
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="node")]
    tensor = numpy_helper.from_array(weight, "w")
    values = [helper.make_tensor_value_info(n, FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}_data",
              size_threshold=0)  # fmt: skip
    return path


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    path = one_node(tmp_path / "g.onnx", "Mul", np.array([1, 70_000], np.float32))
    before = path.read_bytes()
    with pytest.raises(InputRefused, match=r"'w' has values up to 7e\+04"):
        halve_graph(path)
    assert path.read_bytes() == before
    with pytest.raises(InputRefused, match="up to nan"):
        halve_graph(one_node(path, "Mul", np.array([1, np.nan], np.float32)))


def test_the_number_of_a_mask_is_bounded(tmp_path: Path) -> None:
    lowest = np.array(np.finfo(np.float32).min)
    path = one_node(tmp_path / "g.onnx", "Add", lowest)
    halve_graph(path)
    (tensor,) = onnx.load(path).graph.initializer
    assert float(numpy_helper.to_array(tensor)) == -MASKED


def test_an_operator_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = one_node(tmp_path / "g.onnx", "Mod", np.ones(3, np.float32))
    with pytest.raises(InputRefused, match="'node' is Mod"):
        halve_graph(path)


def test_a_data_file_without_use_goes(tmp_path: Path) -> None:
    weight = np.linspace(-1, 1, 64, dtype=np.float32)
    path = one_node(tmp_path / "g.onnx", "Mul", weight, external=True)
    assert (tmp_path / "g.onnx_data").is_file()
    assert halve_graph(path).tensors == 1
    assert not (tmp_path / "g.onnx_data").exists()
    (tensor,) = onnx.load(path).graph.initializer
    np.testing.assert_allclose(numpy_helper.to_array(tensor), weight, atol=5e-4)
