"""The table of the parser's operators, the check against it, and optimization profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.core.errors import InputRefused
from exporter.families.table import family_of
from exporter.graphs.export import export_model
from exporter.graphs.standard.operators import list_operators, require_supported
from exporter.graphs.standard.profiles import (
    InputProfile,
    Limits,
    Range,
    graph_profiles,
    measured_limits,
)
from exporter.graphs.standard.table import CHECKED, LIMITS, SUPPORTED
from tests.support.tiny_llava import write_tiny_llava

from .conftest import make_model, save

Out = Callable[[str], Path]
AXES = {"tiles": Range(1, 5, 5), "rows": Range(1, 70, 70), "image_rows": Range(9, 9, 9)}
LIMIT = Limits(batch=2, prompt=300, likely_prompt=44, context=512, prefix=7, axes=AXES)


def graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray | TensorProto],
    *,
    kind: int = TensorProto.FLOAT,
    opset: int = 21,
) -> Path:
    """A graph file with the input x [2, 4] and the output y."""
    tensors = [
        v if isinstance(v, TensorProto) else numpy_helper.from_array(v, n)
        for n, v in constants.items()
    ]
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", kind, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    domains = sorted({n.domain for n in nodes} | {""})
    opsets = [helper.make_opsetid(d, opset if not d else 1) for d in domains]
    path.write_bytes(helper.make_model(made, opset_imports=opsets).SerializeToString())
    return path


def node(op: str, *inputs: str, outputs: Sequence[str] = ("y",), **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, name=f"my_{op}", **attributes)


def test_the_table_agrees_with_itself() -> None:
    assert len(SUPPORTED) == 158
    assert LIMITS.keys() <= SUPPORTED.keys()
    assert CHECKED <= LIMITS.keys()
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    # Operators of the parser that ai.onnx does not have (any more).
    assert SUPPORTED.keys() - known <= {"ScaledTanh", "ParametricSoftplus", "ImageScaler"}


def test_graphs_of_the_ort_dialect_are_refused_by_name(tmp_path: Path, out: Out) -> None:
    export_model(save(make_model({}, {}), tmp_path / "m"), out("e"))
    path = tmp_path / "e" / "model" / "onnx" / "decoder_model_merged.onnx"
    with pytest.raises(
        InputRefused, match="SimplifiedLayerNormalization.*no operator of the table"
    ):
        require_supported(path)
    problems = {u.name: u.problem for u in list_operators(path)}
    assert "com.microsoft" in problems["GroupQueryAttention"]
    assert problems["Shape"] == problems["ReduceSum"] == ""


def test_a_supported_graph_is_counted(tmp_path: Path) -> None:
    nodes = [node("Abs", "x", outputs=["a"]), node("Abs", "a", outputs=["b"]), node("Sqrt", "b")]
    path = graph(tmp_path / "g.onnx", nodes, {})
    assert require_supported(path) == {"Abs": 2, "Sqrt": 1}
    assert list_operators(path)[0].types == ("FP32",)


@pytest.mark.parametrize(
    ("made", "kind", "problem"),
    [
        (node("BitwiseNot", "x"), TensorProto.INT32, "no operator of the table"),
        (node("Sqrt", "x"), TensorProto.DOUBLE, "has DOUBLE values"),
        (node("Softmax", "x"), TensorProto.INT64, "has INT64 values"),
        (node("ReduceSum", "x", "x"), TensorProto.INT64, "axes that the graph computes"),
        (
            node("LayerNormalization", "x", "s", outputs=["y", "m"]),
            TensorProto.FLOAT,
            "more than the normalised values",
        ),
    ],
)
def test_limits_of_operators(made: Any, kind: int, problem: str, tmp_path: Path) -> None:
    constants = {"s": np.ones(4, np.float32)} if "s" in made.input else {}
    path = graph(tmp_path / "g.onnx", [made], constants, kind=kind)
    with pytest.raises(InputRefused, match=f"my_{made.op_type}.*{problem}"):
        require_supported(path)


def int4(name: str, shape: Sequence[int]) -> TensorProto:
    data = np.zeros(int(np.prod(shape)) // 2, np.uint8).tobytes()
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=shape, raw_data=data)


@pytest.mark.parametrize(
    ("codes", "scales", "zero", "block", "problem"),
    [
        (int4("c", (128, 2)), np.ones((2, 2), np.float32), None, 64, ""),
        (int4("c", (64, 2)), np.ones((2, 2), np.float32), None, 32, "64 and 128"),
        (int4("c", (128, 2)), -np.ones((2, 2), np.float32), None, 64, "not above 0"),
        (int4("c", (128, 2)), np.zeros((2, 2), np.float32), None, 64, "not above 0"),
        (int4("c", (100, 2)), np.ones((2, 2), np.float32), None, 64, "broken"),
        (np.ones((100, 2), np.int8), np.ones((2, 2), np.float32), None, 64, "broken"),
        (np.ones((96, 2), np.int8), np.ones((3, 2), np.float32), None, 32, ""),
        (int4("c", (128, 3)), np.ones((2, 3), np.float32), None, 64, "odd length"),
        (np.ones((4, 2), np.int8), np.float32(1), np.int8(3), 0, "zero point other than 0"),
        (np.ones((4, 2), np.uint8), np.float32(1), None, 0, "has UINT8 values"),
    ],
)
def test_limits_of_dequantize_linear(
    codes: Any, scales: Any, zero: Any, block: int, problem: str, tmp_path: Path
) -> None:
    constants = {"c": codes, "s": np.asarray(scales)}
    inputs = ["c", "s"]
    if zero is not None:
        constants["z"] = np.asarray(zero)
        inputs.append("z")
    settings = {"axis": 0, "block_size": block} if block else {}
    nodes = [node("DequantizeLinear", *inputs, **settings)]
    path = graph(tmp_path / "g.onnx", nodes, constants)
    if problem:
        with pytest.raises(InputRefused, match=problem):
            require_supported(path)
    else:
        assert require_supported(path) == {"DequantizeLinear": 1}


def test_an_opset_of_no_parser_is_refused(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx", [node("Abs", "x")], {}, opset=25)
    with pytest.raises(InputRefused, match="opset 25; TensorRT's parser takes 9 to 24"):
        list_operators(path)
    with pytest.raises(InputRefused, match="no such file"):
        list_operators(tmp_path / "absent.onnx")


def test_profiles_of_a_decoder() -> None:
    past = ["batch_size", 2, "past_sequence_length", 16]
    inputs: dict[str, list[int | str]] = {
        "inputs_embeds": ["batch_size", "sequence_length", 64],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "num_logits_to_keep": [],
        "prefix_length": [],
        "cross_key_values.0.key": ["batch_size", 2, "image_rows", 16],
        "past_key_values.0.key": past,
    }
    found = graph_profiles("decoder_model_merged", inputs, LIMIT)
    assert found["prefill"]["inputs_embeds"] == InputProfile((1, 1, 64), (1, 44, 64), (2, 300, 64))
    assert found["prefill"]["past_key_values.0.key"].max == (2, 2, 0, 16)
    assert found["prefill"]["prefix_length"] == InputProfile((0,), (7,), (7,), values=True)
    assert found["decode"] == {
        "prefix_length": InputProfile((0,), (0,), (0,), values=True),
        "cross_key_values.0.key": InputProfile((1, 2, 9, 16), (1, 2, 9, 16), (2, 2, 9, 16)),
        "inputs_embeds": InputProfile((1, 1, 64), (1, 1, 64), (2, 1, 64)),
        "attention_mask": InputProfile((1, 2), (1, 45), (2, 512)),
        "num_logits_to_keep": InputProfile((1,), (1,), (1,), values=True),
        "past_key_values.0.key": InputProfile((1, 2, 1, 16), (1, 2, 44, 16), (2, 2, 511, 16)),
    }
    for profile in found.values():
        for each in profile.values():
            assert all(a <= b <= c for a, b, c in zip(each.min, each.opt, each.max, strict=True))


def test_profiles_of_the_other_graphs() -> None:
    inputs: dict[str, list[int | str]] = {
        "pixel_values": ["batch_size", "tiles", 3, 32, 32],
        "feature_index": ["rows"],
    }
    (found,) = graph_profiles("vision_encoder", inputs, LIMIT).values()
    assert found["pixel_values"].max == (2, 5, 3, 32, 32)
    assert found["feature_index"] == InputProfile((1,), (70,), (70,))
    with pytest.raises(ValueError, match="axis 'width'"):
        graph_profiles("vision_encoder", {"pixel_values": [1, "width"]}, LIMIT)


def test_limits_are_what_the_preparer_makes_of_images(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "m", kind="llava_next")
    config = {"model_type": "llava_next"}
    preparer = family_of(config).open_preparer(folder)
    shapes = {"pixel_values": ["batch_size", "tiles", 3, 32, 32], "feature_index": ["rows"]}
    limits = measured_limits(preparer, "Describe this medical image.", shapes)
    # 128 x 128 pixels in tiles of 32, and the whole image.
    assert limits.axes["tiles"] == Range(1, 17, 17)
    assert limits.context == 640
    assert limits.likely_prompt < limits.prompt <= limits.context
    assert 17 * 16 <= limits.axes["rows"].greatest <= limits.likely_prompt
