"""The part of TensorRT's Python API that we call, as a literal table.

Source: the signatures in the published bindings of TensorRT 10.3.0, 10.16.1.11 and 11.4.0.106
(packages tensorrt-cu12-bindings on PyPI), whose docstrings hold them. `METHODS`: names of the
arguments by position, as pybind11 has them; `PROPERTIES`: read, or written where marked "w".
"""

from __future__ import annotations

METHODS: dict[str, tuple[str, ...]] = {
    "ILogger.__init__": (),
    "Builder.__init__": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "OnnxParser.__init__": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.get_error": ("index",),
    "ParserError.desc": (),
    "ParserError.node_name": (),
    "ParserError.node_operator": (),
    "INetworkDefinition.get_input": ("index",),
    "INetworkDefinition.get_layer": ("index",),
    "ILayer.get_output": ("index",),
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.clear_flag": ("flag",),
    "IBuilderConfig.set_memory_pool_limit": ("pool", "pool_size"),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "IOptimizationProfile.set_shape_input": ("input", "min", "opt", "max"),
    "Runtime.__init__": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_shape": ("name",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_location": ("name",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "ICudaEngine.create_execution_context": ("strategy",),
    "ICudaEngine.get_weight_streaming_automatic_budget": (),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
}
PROPERTIES: dict[str, str] = {
    "OnnxParser.num_errors": "r",
    "INetworkDefinition.num_inputs": "r",
    "INetworkDefinition.num_layers": "r",
    "ITensor.name": "r",
    "ITensor.dtype": "r",
    "ITensor.is_shape_tensor": "r",
    "ILayer.num_outputs": "r",
    "IBuilderConfig.builder_optimization_level": "w",
    "Runtime.engine_host_code_allowed": "w",
    "ICudaEngine.num_io_tensors": "r",
    "ICudaEngine.num_optimization_profiles": "r",
    "ICudaEngine.streamable_weights_size": "r",
    "ICudaEngine.weight_streaming_budget_v2": "w",
}
ENUMS: dict[str, tuple[str, ...]] = {
    "BuilderFlag": ("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "TF32"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "MemoryPoolType": ("WORKSPACE",),
    "TensorIOMode": ("INPUT",),
    "TensorLocation": ("HOST",),
    "ExecutionContextAllocationStrategy": ("ON_PROFILE_CHANGE",),
}
FUNCTIONS = ("nptype",)
