"""A deserialized TensorRT engine: its inputs and outputs, and running it at given shapes.

Not run on hardware: docs/engines.md lists what was checked and what was not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes.trt_api import LastErrors, make_logger
from exporter.runtimes.trt_memory import Buffers, DeviceMemory, aligned

REBUILD = "run `medexport engine build BUNDLE` on this machine"


@dataclass(frozen=True)
class Tensor:
    """An input or output; -1 in `shape` where a size is not fixed; `host`: TensorRT reads its values
    on the host, because shapes follow from them.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool
    host: bool


@dataclass(frozen=True)
class RuntimeOptions:
    """`host_code`: let a version-compatible engine run the code that it brings. `weight_budget`: bytes
    of weights kept on the GPU by an engine that streams them (None: all that fit, TensorRT decides).
    """

    host_code: bool = False
    weight_budget: int | None = None


class Loader:
    """Deserializes engine files with one runtime and one logger."""

    def __init__(self, trt: Any, options: RuntimeOptions | None = None) -> None:
        self._trt, self._options = trt, options or RuntimeOptions()
        self.errors = LastErrors()
        self._logger = make_logger(trt, self.errors)  # must outlive the runtime
        self._runtime = trt.Runtime(self._logger)
        if self._options.host_code:
            self._runtime.engine_host_code_allowed = True

    def load(self, path: Path) -> Engine:
        """The engine in `path`. Raises `InputRefused` when TensorRT does not take it.

        There is no call that tells beforehand: trying is the check.
        """
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise InputRefused(
                f"{path}: TensorRT does not load it ({self.errors.text()}); {REBUILD}"
            )
        if engine.streamable_weights_size:
            budget = self._options.weight_budget
            engine.weight_streaming_budget_v2 = (
                engine.get_weight_streaming_automatic_budget() if budget is None else budget
            )
        return Engine(self._trt, engine, path.stem, self.errors)


class Engine:
    """One loaded engine."""

    def __init__(self, trt: Any, engine: Any, name: str, errors: LastErrors) -> None:
        """Read what the engine takes and gives. Raises `InputRefused` for a type numpy lacks."""
        self.name, self.engine, self.errors = name, engine, errors
        self._trt = trt
        self.streams_weights = bool(engine.streamable_weights_size)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.tensors = {n: self._tensor(n) for n in names}
        self.profiles = int(engine.num_optimization_profiles)

    def bounds(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Least and greatest shape of the input `name` in one profile."""
        least, _, most = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(int(d) for d in least), tuple(int(d) for d in most)

    def context(self, profile: int, memory: DeviceMemory) -> Context:
        """A context for one profile; its activations live on the GPU until it is dropped."""
        # Memory for the shapes of this profile alone, not for the greatest of all profiles.
        strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        made = self.engine.create_execution_context(strategy)
        if made is None or not made.set_optimization_profile_async(profile, memory.stream):
            raise EnvironmentLacks(
                f"TensorRT makes no context for '{self.name}' ({self.errors.text()}); was GPU memory "
                "short?"
            )
        return Context(self, made, memory, profile)

    def _tensor(self, name: str) -> Tensor:
        engine, trt = self.engine, self._trt
        kind = engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(trt.nptype(kind))
        except TypeError as error:  # bfloat16 and packed types have no numpy type
            raise InputRefused(
                f"engine '{self.name}' has {name} of type {kind}; expected a type that numpy has"
            ) from error
        return Tensor(
            name,
            dtype,
            tuple(int(d) for d in engine.get_tensor_shape(name)),
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        )


class Context:
    """An execution context. Every call that TensorRT answers with False becomes an error."""

    def __init__(self, engine: Engine, context: Any, memory: DeviceMemory, profile: int) -> None:
        self.engine, self.memory = engine, memory
        self._profile = profile
        self._context = context
        self._buffers = Buffers(memory)
        self._host: dict[str, NDArray[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def state(self) -> Hashable:
        """All shapes and addresses set so far: while they stay the same, so does the work."""
        return tuple(sorted(self._shapes.items())), tuple(sorted(self.addresses.items()))

    def resize(self, name: str, shape: Sequence[int]) -> None:
        """Set the shape of an input. Raises `InputRefused` outside the engine's profile."""
        if not self._context.set_input_shape(name, tuple(shape)):
            least, most = self.engine.bounds(name, self._profile)
            raise InputRefused(
                f"engine '{self.engine.name}': {name} of shape {list(shape)}; it was built for "
                f"{list(least)} to {list(most)}: use another input, or the ONNX graph"
            )
        self._shapes[name] = tuple(shape)

    def bind(self, name: str, address: int) -> None:
        """Set the address of an input or output."""
        if not self._context.set_tensor_address(name, address):
            raise ValueError(f"engine '{self.engine.name}' takes no address for {name}")
        self.addresses[name] = address

    def give(self, name: str, array: NDArray[Any]) -> None:
        """Set an input's shape, address and values, in the engine's own type."""
        tensor = self.engine.tensors[name]
        values = np.ascontiguousarray(array, tensor.dtype).reshape(array.shape)
        self.resize(name, values.shape)
        self.bind(name, self.write(name, values))

    def write(self, name: str, values: NDArray[Any]) -> int:
        """Put values of the engine's own type where the input `name` is read; returns the address."""
        if self.engine.tensors[name].host:
            held = self._host.get(name)
            if held is None or held.shape != values.shape:
                held = self._host[name] = aligned(values.shape, values.dtype)
            held[...] = values
            return int(held.ctypes.data)
        address = self._buffers.get(name, values.nbytes)
        if values.size:
            self.memory.upload(address, values)
        return address

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output once all inputs are given. Raises `InputRefused` where it is unknown."""
        found = tuple(int(d) for d in self._context.get_tensor_shape(name))
        if min(found, default=0) < 0:
            raise InputRefused(
                f"engine '{self.engine.name}': the shape of {name}, {list(found)}, follows from values; "
                "expected one that follows from the inputs' shapes"
            )
        return found

    def receive(self, name: str) -> Callable[[], NDArray[Any]]:
        """Bind an output to memory of its own; the function returned fetches it after `enqueue`."""
        dtype = self.engine.tensors[name].dtype
        shape = self.shape(name)
        address = self._buffers.get(name, int(np.prod(shape)) * dtype.itemsize)
        self.bind(name, address)

        def fetch() -> NDArray[Any]:
            array = np.empty(shape, dtype)
            self.memory.download(address, array)
            return array

        return fetch

    def enqueue(self) -> None:
        """Put the engine on the stream. Raises `EnvironmentLacks` when TensorRT refuses."""
        if not self._context.execute_async_v3(self.memory.stream):
            raise EnvironmentLacks(
                f"TensorRT does not run engine '{self.engine.name}': {self.engine.errors.text()}"
            )

    def run(self, feed: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Give all inputs, run, and fetch `outputs` in their order.

        Raises `InputRefused` when the inputs are not the engine's or too large for it.
        """
        wanted = {t.name for t in self.engine.tensors.values() if t.is_input}
        if feed.keys() != wanted:
            raise InputRefused(
                f"engine '{self.engine.name}' takes {sorted(wanted)}, given are {sorted(feed)}"
            )
        for name, array in feed.items():
            self.give(name, array)
        fetches = {n: self.receive(n) for n, t in self.engine.tensors.items() if not t.is_input}
        self.enqueue()
        return [fetches[name]() for name in outputs]

    def close(self) -> None:
        """Free the memory of inputs and outputs."""
        self._buffers.close()
