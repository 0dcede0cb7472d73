"""The running half of the stand-in for ``tensorrt``: engines compute with onnxruntime."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from exporter.runtimes.trt_memory import ALIGNMENT
from tests.support.fake_tensorrt_types import (
    NUMPY,
    SEPARATOR,
    SHAPE_INPUTS,
    TYPES,
    DataType,
    ExecutionContextAllocationStrategy,
    Severity,
    TensorIOMode,
    TensorLocation,
)


class Runtime:
    trt: Any = None
    __slots__ = ("_allowed", "_logger")

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self.trt.ILogger)
        self._logger, self._allowed = logger, False

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._allowed = self.trt.seen.host_code = value

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        head, found, graph = serialized_engine.partition(SEPARATOR)
        if not found:
            self._logger.said(Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        facts = json.loads(head)
        if facts["compatible"] and not self._allowed:
            self._logger.said(Severity.ERROR, "host code of the plan is not allowed")
            return None
        if facts["version"] != self.trt.__version__ and not facts["compatible"]:
            self._logger.said(Severity.ERROR, f"plan of version {facts['version']}")
            return None
        return ICudaEngine(self.trt, facts["profiles"], graph)


class ICudaEngine:
    __slots__ = ("budget", "inputs", "names", "profiles", "session", "trt", "values")

    def __init__(self, trt: Any, profiles: list[Any], graph: bytes) -> None:
        self.trt, self.profiles = trt, profiles
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        model = onnx.load_model_from_string(graph).graph
        self.inputs = [i.name for i in model.input]
        self.values = {v.name: v.type.tensor_type for v in (*model.input, *model.output)}
        self.names = list(self.values)
        self.budget: int | None = None

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    @property
    def streamable_weights_size(self) -> int:
        return 1000 if self.trt.streams_weights else 0

    @property
    def weight_streaming_budget_v2(self) -> int | None:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        self.budget = value

    def get_weight_streaming_automatic_budget(self) -> int:
        return 600

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self.values[name].elem_type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.values[name].shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in SHAPE_INPUTS else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self.profiles[profile_index]["shapes"][name]

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        assert isinstance(strategy, ExecutionContextAllocationStrategy)
        return IExecutionContext(self)


class IExecutionContext:
    __slots__ = ("_addresses", "_engine", "_outputs", "_profile", "_shapes")

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile = engine, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._outputs: dict[Any, dict[str, tuple[int, ...]]] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == self._engine.trt._memory.stream
        self._profile = profile_index
        return profile_index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        profile = self._engine.profiles[self._profile]
        if name in profile["shapes"]:
            least, _, most = profile["shapes"][name]
            if len(shape) != len(least):
                return False
            if any(not a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
                return False
        elif shape != ():
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory and memory % ALIGNMENT == 0, f"{name} at {memory:#x}"
        if name not in self._engine.values:
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._all_shapes()[name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt = self._engine.trt
        assert stream_handle == trt._memory.stream
        assert self._addresses.keys() == set(self._engine.names), "an address is missing"
        host = {n: self._array(n, (), self._addresses[n]).copy() for n in self._hosts()}
        shapes, addresses = dict(self._all_shapes()), dict(self._addresses)

        def work() -> None:
            feed = {
                n: host[n] if n in host else self._array(n, shapes[n], addresses[n])
                for n in self._engine.inputs
            }
            self._check_values(host)
            outputs = [n for n in self._engine.names if n not in self._engine.inputs]
            for name, made in zip(outputs, self._engine.session.run(outputs, feed), strict=True):
                assert made.shape == shapes[name]
                if trt.disturb and name == "logits":
                    made[..., 0] += trt.disturb
                target = self._array(name, made.shape, addresses[name])
                target[...] = made

        trt._memory.run(work)
        return True

    def _hosts(self) -> list[str]:
        return [n for n in self._engine.inputs if n in SHAPE_INPUTS]

    def _check_values(self, host: dict[str, np.ndarray]) -> None:
        for name, values in host.items():
            least, _, most = self._engine.profiles[self._profile]["numbers"][name]
            assert least[0] <= int(values) <= most[0], f"{name} is {values}"

    def _array(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        dtype = np.dtype(NUMPY[self._engine.get_tensor_dtype(name)])
        size = int(np.prod(shape)) * dtype.itemsize
        if name not in SHAPE_INPUTS:
            self._engine.trt._memory.check(address, max(size, 1))
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of everything: those of outputs by running the graph on zeros."""
        assert self._shapes.keys() == set(self._engine.inputs), "a shape is missing"
        host = {n: self._array(n, (), self._addresses[n]).copy() for n in self._hosts()}
        key = (tuple(sorted(self._shapes.items())), tuple(int(v) for v in host.values()))
        if key not in self._outputs:
            feed = {
                n: host[n] if n in host else np.zeros(s, NUMPY[self._engine.get_tensor_dtype(n)])
                for n, s in self._shapes.items()
            }
            names = [n for n in self._engine.names if n not in self._engine.inputs]
            made = self._engine.session.run(names, feed)
            self._outputs = {key: {n: m.shape for n, m in zip(names, made, strict=True)}}
        return {**self._shapes, **self._outputs[key]}
