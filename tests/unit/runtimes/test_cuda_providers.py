"""Which nodes may be on the CPU, what is refused, and what is said without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes import ort_cuda
from exporter.runtimes.onnx_scan import FLOAT, FLOAT16, scan_graph
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.ort_session import FAILURES, session_options
from exporter.runtimes.providers import (
    CPU,
    CUDA,
    NO_FALLBACK,
    RECORD,
    SHAPE_OPERATORS,
    Placement,
    check_placement,
    read_placement,
    require_cuda,
    require_used,
)

FLOAT32 = TensorProto.FLOAT


def write_graph(
    path: Path, nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, int], output: str
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, ["a", "b"]) for n, kind in inputs.items()],
        [helper.make_tensor_value_info(output, FLOAT32, ["a", "b"])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def shaped(path: Path) -> Path:
    """y = reshape(x + x, shape(x)): one node for the GPU and one that belongs on the CPU."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Add", ["x", "x"], ["d"], name="twice"),
        helper.make_node("Reshape", ["d", "s"], ["y"], name="same"),
    ]
    return write_graph(path, nodes, {"x": FLOAT32}, "y")


# The file reader.


def test_the_reader_finds_what_onnx_finds(exported: Path) -> None:
    for path in sorted((exported / "onnx").glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        found = scan_graph(path)
        names = [f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node]
        assert found.operators == {n: names.count(n) for n in names}
        assert found.inputs == {i.name: i.type.tensor_type.elem_type for i in graph.input}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an ONNX file"),
        (b"not a graph", "not an ONNX file"),
        (b"\x3a\xff\xff\xff\x7f", "beyond its message"),
        (b"\x08\x0a", "no operators"),
        (b"\x80" * 30, "longer than 64 bits"),
    ],
    ids=["empty", "text", "truncated", "no graph", "endless number"],
)
def test_the_reader_refuses_what_is_no_graph(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=said):
        scan_graph(path)
    with pytest.raises(InputRefused, match="expected an exported graph"):
        scan_graph(tmp_path / "missing.onnx")


# What onnxruntime itself does: facts that the rules stand on.


def test_the_option_refuses_any_node_on_the_cpu(tmp_path: Path) -> None:
    """Also with the CPU provider only implied; added explicitly it is a conflict."""
    path = shaped(tmp_path / "g.onnx")
    options = session_options(1)
    options.add_session_config_entry(NO_FALLBACK, "1")
    options.log_severity_level = 4
    with pytest.raises(FAILURES, match="fallback to CPU EP has been explicitly disabled"):
        ort.InferenceSession(str(path), options)
    with pytest.raises(FAILURES, match="Conflicting session configuration"):
        ort.InferenceSession(str(path), options, providers=[CPU])


def test_the_record_names_every_node_of_a_real_session(tmp_path: Path, exported: Path) -> None:
    options = session_options(1)
    options.add_session_config_entry(RECORD, "1")
    path = shaped(tmp_path / "g.onnx")
    placement = read_placement(ort.InferenceSession(str(path), options, providers=[CPU]))
    assert placement.nodes == {CPU: {"Shape": 1, "Add": 1, "Reshape": 1}}
    decoder = exported / "onnx" / "decoder_model_merged.onnx"
    session = ort.InferenceSession(str(decoder), options, providers=[CPU])
    found = read_placement(session).nodes[CPU]
    asked = scan_graph(decoder).operators
    assert found["com.microsoft::GroupQueryAttention"] == 2
    assert asked["com.microsoft::GroupQueryAttention"] == 2
    # The same session as a GPU's would be refused for its attention, not for its shapes.
    with pytest.raises(InputRefused, match="none of its"):
        check_placement(read_placement(session), asked, "decoder")


def test_an_onnxruntime_without_the_record_is_refused() -> None:
    with pytest.raises(EnvironmentLacks, match="--upgrade"):
        read_placement(SimpleNamespace())


# The rule.


def test_shape_arithmetic_may_be_on_the_cpu_and_nothing_else() -> None:
    operators = {"Shape": 1, "Add": 2, "MatMul": 3}
    good = Placement({CUDA: {"MatMul": 3, "Add": 1}, CPU: {"Shape": 1, "Add": 1}})
    check_placement(good, operators, "decoder")
    fallen = Placement({CUDA: {"MatMul": 2}, CPU: {"Shape": 1, "MatMul": 1}})
    with pytest.raises(InputRefused, match=r"decoder: onnxruntime put 1 MatMul on the CPU"):
        check_placement(fallen, operators, "decoder")
    attention = Placement({CUDA: {"MatMul": 2}, CPU: {"com.microsoft::GroupQueryAttention": 32}})
    with pytest.raises(InputRefused, match="32 com.microsoft::GroupQueryAttention"):
        check_placement(attention, operators, "decoder")


def test_without_shapes_nothing_may_be_on_the_cpu() -> None:
    split = Placement({CUDA: {"MatMul": 1}, CPU: {"Add": 1}})
    with pytest.raises(InputRefused, match="1 Add on the CPU"):
        check_placement(split, {"MatMul": 1, "Add": 1}, "embed")
    check_placement(Placement({CUDA: {"MatMul": 1, "Add": 1}}), {"MatMul": 1, "Add": 1}, "embed")


def test_no_operator_with_weights_is_shape_arithmetic() -> None:
    heavy = {"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Relu", "Einsum"}
    assert not heavy & SHAPE_OPERATORS
    assert not [op for op in SHAPE_OPERATORS if "::" in op]


def test_a_dropped_provider_is_an_error() -> None:
    require_used(SimpleNamespace(get_providers=lambda: [CUDA, CPU]), "vision")
    with pytest.raises(EnvironmentLacks, match=r"vision: asked for CUDAExecutionProvider, got CPU"):
        require_used(SimpleNamespace(get_providers=lambda: [CPU]), "vision")


def test_what_cuda_has_no_kernel_for_is_refused_before_loading(tmp_path: Path) -> None:
    def facts(op: str, kind: int) -> Any:
        node = helper.make_node(op, ["x", "past_key_values.0.key"], ["y"], domain="com.microsoft")
        inputs = {"x": kind, "past_key_values.0.key": kind}
        return scan_graph(write_graph(tmp_path / "g.onnx", [node], inputs, "y"))

    ort_cuda.check_graph(facts("GroupQueryAttention", FLOAT16), "g.onnx")
    with pytest.raises(InputRefused, match="--compute float16"):
        ort_cuda.check_graph(facts("GroupQueryAttention", FLOAT), "g.onnx")
    with pytest.raises(InputRefused, match="int8-static is for CPUs"):
        ort_cuda.check_graph(facts("MatMulIntegerToFloat", FLOAT16), "g.onnx")


# Without a GPU.


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_without_the_provider_the_package_is_named(exported: Path) -> None:
    with pytest.raises(EnvironmentLacks, match=r"medexport\[gpu\]") as caught:
        OrtCaptioner(exported, threads=1, device="cuda")
    assert "CPUExecutionProvider" in str(caught.value)
    assert "medexport doctor" in str(caught.value)
    assert caught.value.exit_code == 5


def test_two_onnxruntimes_side_by_side_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: [CPU])
    monkeypatch.setattr("exporter.runtimes.providers.version", lambda name: "1.31.1")
    with pytest.raises(EnvironmentLacks, match="installed beside onnxruntime"):
        require_cuda(runtime)
    runtime.get_available_providers = lambda: [CUDA, CPU]
    require_cuda(runtime)


def test_the_probe_is_a_graph_that_runs_and_finds_a_dead_provider() -> None:
    session = ort.InferenceSession(ort_cuda.PROBE, providers=[CPU])
    (y,) = session.run(None, {"x": np.array([-3], np.float32)})
    assert y.tolist() == [0]

    class Runtime:
        __version__, cuda_version, SessionOptions = "1.31.1", "13.0", ort.SessionOptions

        def __init__(self, answer: Any) -> None:
            self._answer, self.preloaded, self.level = answer, 0, 0

        def set_default_logger_severity(self, level: int) -> None:
            self.level = level

        def preload_dlls(self) -> None:
            self.preloaded += 1
            print("Failed to load libcudnn.so.9")

        def InferenceSession(self, *_: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
            if isinstance(self._answer, Exception):
                raise self._answer
            return SimpleNamespace(get_providers=lambda: self._answer)

    working = Runtime([CUDA, CPU])
    ort_cuda.require_working(working)
    assert (working.preloaded, working.level) == (1, 2), "logging is as it was"
    with pytest.raises(EnvironmentLacks, match=r"got CPUExecutionProvider.*libcudnn\.so\.9"):
        ort_cuda.require_working(Runtime([CPU]))
    with pytest.raises(EnvironmentLacks, match=r"built for CUDA 13.0, .*driver too old"):
        ort_cuda.require_working(Runtime(RuntimeError("CUDA failure 35: driver too old")))


def test_what_the_probe_prints_is_not_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    class Runtime:
        __version__, SessionOptions = "1.31.1", ort.SessionOptions

        def set_default_logger_severity(self, level: int) -> None:
            pass

        def preload_dlls(self) -> None:
            print("Failed to load libcudnn.so.9")

        def InferenceSession(self, *_: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
            return SimpleNamespace(get_providers=lambda: [CUDA])

    ort_cuda.require_working(Runtime())
    assert capsys.readouterr().out == "", "--json prints one document there"


class CudaRuntime:
    """onnxruntime as with a GPU: takes only what `open_cuda_session` may ask for, and places nodes."""

    __version__ = "1.31.1"

    def __init__(self, on_cpu: Sequence[tuple[str, str]] = (), *, dropped: bool = False) -> None:
        self.SessionOptions, self.opened = ort.SessionOptions, []
        self._on_cpu, self._dropped = on_cpu, dropped

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def InferenceSession(  # noqa: N802
        self, path: str, options: ort.SessionOptions, *, providers: Any, enable_fallback: int
    ) -> CudaSession:
        ((name, settings),) = providers
        assert name == CUDA, "the CPU provider must not be asked for"
        assert settings["device_id"] == "0"
        assert settings["use_tf32"] == "0"
        assert enable_fallback == 0, "or a failed session is tried again on the CPU"
        assert options.get_session_config_entry(RECORD) == "1"
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        strict = _entry(options, NO_FALLBACK) == "1"
        graph = onnx.load(path, load_external_data=False).graph
        here = [n for n in graph.node if (n.op_type, n.name) in self._on_cpu]
        if strict and here:
            raise FAILURES[0](
                "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to "
                "the default CPU EP, but fallback to CPU EP has been explicitly disabled by the user."
            )
        rest = [n for n in graph.node if n not in here]
        session = CudaSession({CPU: here, CUDA: rest}, strict, self._dropped)
        self.opened.append(session)
        return session


class CudaSession:
    def __init__(self, nodes: Mapping[str, Any], strict: bool, dropped: bool) -> None:
        self._nodes, self.strict, self._dropped = nodes, strict, dropped

    def get_providers(self) -> list[str]:
        return [CPU] if self._dropped else [CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=ep, get_nodes=lambda n=n: [n])
            for ep, nodes in self._nodes.items()
            for n in nodes
        ]


def _entry(options: ort.SessionOptions, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:  # never set
        return ""


def test_a_session_is_opened_strictly_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = shaped(tmp_path / "g.onnx")
    runtime = CudaRuntime([("Shape", "shape")])
    monkeypatch.setattr(ort_cuda, "ort", runtime)
    ort_cuda.open_cuda_session(path, 1)
    assert [s.strict for s in runtime.opened] == [False]
    # A node that is no shape arithmetic.
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], name="product")]
    plain = write_graph(tmp_path / "p.onnx", nodes, {"x": FLOAT32}, "y")
    ort_cuda.open_cuda_session(plain, 1)
    assert runtime.opened[-1].strict, "without shapes onnxruntime itself refuses"
    monkeypatch.setattr(ort_cuda, "ort", CudaRuntime([("MatMul", "product")]))
    with pytest.raises(InputRefused, match="would run nodes of it on the CPU"):
        ort_cuda.open_cuda_session(plain, 1)
    mixed = write_graph(
        tmp_path / "m.onnx",
        [*nodes, helper.make_node("Shape", ["y"], ["s"], name="shape")],
        {"x": FLOAT32},
        "y",
    )
    monkeypatch.setattr(ort_cuda, "ort", CudaRuntime([("MatMul", "product"), ("Shape", "shape")]))
    with pytest.raises(InputRefused, match="none of its 2 nodes"):
        ort_cuda.open_cuda_session(mixed, 1)
    monkeypatch.setattr(ort_cuda, "ort", CudaRuntime(dropped=True))
    with pytest.raises(EnvironmentLacks, match="nvidia-smi"):
        ort_cuda.open_cuda_session(path, 1)


@pytest.mark.gpu
def test_float16_graphs_run_on_the_gpu_as_on_the_cpu(
    exported: Path, tmp_path: Path, pictures: list[Any]
) -> None:
    import shutil

    from exporter.graphs.half import halve_export

    shutil.copytree(exported.parent, tmp_path / "half")
    halve_export(tmp_path / "half")
    model = tmp_path / "half" / "model"
    here, there = (OrtCaptioner(model, threads=1, device=d) for d in ("cpu", "cuda"))
    for image in pictures[:3]:
        tokens = here.caption(image, "Describe.", 12).tokens
        expected = here.score(image, "Describe.", tokens)
        found = there.score(image, "Describe.", tokens)
        assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 0.01
        assert len(there.caption(image, "Describe.", 12).tokens) > 0
