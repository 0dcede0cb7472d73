"""Enums and types of the stand-in for ``tensorrt``."""

from __future__ import annotations

from enum import Enum, IntEnum

import numpy as np
from onnx import TensorProto

SEPARATOR = b"\n--graph--\n"
# What TensorRT reads on the host, because the shape of the logits follows from it.
SHAPE_INPUTS = ("num_logits_to_keep",)


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(Enum):
    FLOAT, HALF, INT8, INT32, INT64, BOOL, UINT8, INT4, BF16 = range(9)


TYPES = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.INT8: DataType.INT8,
    TensorProto.INT32: DataType.INT32,
    TensorProto.INT64: DataType.INT64,
    TensorProto.BOOL: DataType.BOOL,
    TensorProto.INT4: DataType.INT4,
    TensorProto.UINT8: DataType.UINT8,
}
NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
}
BuilderFlag = Enum("BuilderFlag", "VERSION_COMPATIBLE WEIGHT_STREAMING TF32")
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
