"""A stand-in for the module ``tensorrt``: strict about names and arguments, computing with onnxruntime.

It takes the calls of `tensorrt_api` and no others; addresses must lie in memory that was allocated,
shapes inside the profile in use, profiles must cover all inputs. What an engine of the real library
would compute, onnxruntime computes from the graph.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

import numpy as np

from tests.support.fake_tensorrt_build import Builder, ILogger, OnnxParser
from tests.support.fake_tensorrt_run import Runtime
from tests.support.fake_tensorrt_types import (
    NUMPY,
    BuilderFlag,
    DataType,
    ExecutionContextAllocationStrategy,
    MemoryPoolType,
    Severity,
    TensorIOMode,
    TensorLocation,
)
from tests.support.host_memory import HostMemory


class FakeTensorRT:
    """The module. `memory` is the GPU that its engines compute on."""

    def __init__(self, memory: HostMemory, version: str = "10.16.1.11") -> None:
        self.__version__ = version
        self._memory = memory
        for made in (ILogger, Builder, OnnxParser, Runtime):
            setattr(
                self, made.__name__, type(made.__name__, (made,), {"trt": self, "__slots__": ()})
            )
        self.ILogger.Severity = Severity
        strongly = {"STRONGLY_TYPED": 0} if version.startswith("11.") else {"STRONGLY_TYPED": 1}
        self.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", strongly)
        self.BuilderFlag = BuilderFlag
        self.MemoryPoolType = MemoryPoolType
        self.TensorIOMode = TensorIOMode
        self.TensorLocation = TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        # Knobs of tests.
        self.timing_cache_taken = True
        self.build_fails = ""
        self.streams_weights = False
        self.disturb = 0.0
        self.seen = SimpleNamespace(flags=set(), level=None, pools={}, profiles=[], host_code=None)

    @staticmethod
    def nptype(trt_type: DataType) -> type[np.generic]:
        if trt_type not in NUMPY:
            raise TypeError(f"{trt_type} has no numpy type")
        return NUMPY[trt_type]
