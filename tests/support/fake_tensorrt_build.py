"""The building half of the stand-in for ``tensorrt``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from tests.support.fake_tensorrt_types import (
    SEPARATOR,
    SHAPE_INPUTS,
    TYPES,
    BuilderFlag,
    DataType,
    MemoryPoolType,
    Severity,
)

UNPARSED = "Unparsable"


class ILogger:
    trt: Any = None

    def __init__(self) -> None:
        self.ready = True

    def said(self, severity: Severity, msg: str) -> None:
        assert self.ready, "ILogger.__init__ was not called"
        self.log(severity, msg)


class Builder:
    trt: Any = None
    __slots__ = ("_logger",)

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self.trt.ILogger)
        self._logger = logger
        logger.said(Severity.INFO, "builder made")

    def create_network(self, flags: int) -> INetworkDefinition:
        strongly = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags == strongly, f"flags {flags}, strongly typed is {strongly}"
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self.trt)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        trt = self.trt
        self._logger.said(Severity.VERBOSE, f"building {len(network.model.graph.node)} nodes")
        assert config.cache is not None, "no timing cache"
        for profile in config.profiles:
            given = profile.shapes.keys() | profile.numbers.keys()
            dynamic = {i.name for i in network.inputs if i.is_shape_tensor or i.dynamic}
            assert dynamic <= given <= {i.name for i in network.inputs}
        if trt.build_fails:
            self._logger.said(Severity.ERROR, trt.build_fails)
            return None
        trt.seen.flags, trt.seen.level = set(config.flags), config.builder_optimization_level
        trt.seen.pools = dict(config.pools)
        trt.seen.profiles.append(config.profiles)
        config.cache.content = b"timings of " + trt.__version__.encode()
        head = {
            "version": trt.__version__,
            "device": trt._memory.facts.name,
            "compatible": BuilderFlag.VERSION_COMPATIBLE in config.flags,
            "profiles": [{"shapes": p.shapes, "numbers": p.numbers} for p in config.profiles],
        }
        return json.dumps(head).encode() + SEPARATOR + network.model.SerializeToString()


class INetworkDefinition:
    __slots__ = ("inputs", "layers", "model")

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.layers: list[ILayer] = []

    def fill(self, path: Path) -> None:
        self.model = onnx.load_model(path, load_external_data=True)
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        kinds = {t.name: t.data_type for t in self.model.graph.initializer}
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds |= {v.name: v.type.tensor_type.elem_type for v in values}
        self.inputs = [
            ITensor(
                i.name,
                TYPES[kinds[i.name]],
                i.name in SHAPE_INPUTS,
                any(d.dim_param for d in i.type.tensor_type.shape.dim),
            )
            for i in self.model.graph.input
        ]
        # TensorRT makes layers of weights too.
        self.layers = [ILayer([TYPES[t.data_type]]) for t in self.model.graph.initializer]
        self.layers += [
            ILayer([TYPES[kinds[o]] for o in n.output if o in kinds]) for n in self.model.graph.node
        ]

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]


class ITensor:
    __slots__ = ("_dtype", "_name", "_shape_tensor", "dynamic")

    def __init__(
        self, name: str, dtype: DataType, shape_tensor: bool, dynamic: bool = False
    ) -> None:
        self._name, self._dtype, self._shape_tensor = name, dtype, shape_tensor
        self.dynamic = dynamic

    name = property(lambda self: self._name)
    dtype = property(lambda self: self._dtype)
    is_shape_tensor = property(lambda self: self._shape_tensor)


class ILayer:
    __slots__ = ("_kinds",)

    def __init__(self, kinds: list[DataType]) -> None:
        self._kinds = kinds

    @property
    def num_outputs(self) -> int:
        return len(self._kinds)

    def get_output(self, index: int) -> ITensor:
        return ITensor("", self._kinds[index], False)


class OnnxParser:
    trt: Any = None
    __slots__ = ("_errors", "_network")

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        assert isinstance(logger, self.trt.ILogger)
        self._network, self._errors = network, []

    def parse_from_file(self, model: str) -> bool:
        assert isinstance(model, str)
        nodes = onnx.load_model(model, load_external_data=False).graph.node
        self._errors = [
            ParserError(n.name, n.op_type) for n in nodes if n.domain or n.op_type == UNPARSED
        ]
        if not self._errors:
            self._network.fill(Path(model))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class ParserError:
    __slots__ = ("_name", "_operator")

    def __init__(self, name: str, operator: str) -> None:
        self._name, self._operator = name, operator

    def desc(self) -> str:
        return "Plugin not found,\nare the plugin name and version right?"

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator


class IBuilderConfig:
    __slots__ = ("_trt", "builder_optimization_level", "cache", "flags", "pools", "profiles")

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self.builder_optimization_level = 3
        self.flags = {BuilderFlag.TF32}  # on by default, as in the library
        self.pools: dict[Any, int] = {}
        self.profiles: list[IOptimizationProfile] = []
        self.cache: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        assert isinstance(flag, BuilderFlag)
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        assert isinstance(flag, BuilderFlag)
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert isinstance(pool, MemoryPoolType)
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        taken = not cache.content or self._trt.timing_cache_taken
        if taken:
            self.cache = cache
        return taken

    def get_timing_cache(self) -> ITimingCache:
        assert self.cache is not None
        return self.cache


class ITimingCache:
    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class IOptimizationProfile:
    __slots__ = ("numbers", "shapes")

    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}
        self.numbers: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self.shapes[input] = _ranges(min, opt, max)

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        assert input in SHAPE_INPUTS
        self.numbers[input] = _ranges(min, opt, max)


def _ranges(least: Any, likely: Any, most: Any) -> list[list[int]]:
    rows = [list(least), list(likely), list(most)]
    if any(not a <= b <= c for a, b, c in zip(*rows, strict=True)):
        raise ValueError(f"inconsistent ranges {rows}")
    return rows
