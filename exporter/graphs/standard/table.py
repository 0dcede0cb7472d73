"""Operators that TensorRT's ONNX parser takes, with their types and limits, as its documentation has them.

Operators of the table that are not here are "N" there.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "onnx-tensorrt docs/operators.md, TensorRT 10.15"

# Types, and the operators that take these.
_BY_TYPES: Mapping[str, str] = {
    "FP32 FP16 BF16": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv "
        "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm "
        "GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish "
        "Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu "
        "Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu "
        "ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike "
        "RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh "
        "Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu "
        "Upsample"
    ),
    "FP32 FP16 BF16 INT32 INT64": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less "
        "LessOrEqual Max Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
        "Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
    ),
    "FP32 FP16 BF16 INT32 INT64 BOOL": (
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze "
        "Where"
    ),
    "FP32 FP16": (
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression "
        "NonZero RoiAlign"
    ),
    "BOOL": ("And Not Or Xor"),
    "FP32 FP16 BF16 INT32 INT64 UINT8 BOOL": ("Cast CastLike"),
    "FP32 FP16 BF16 FP8 FP4 INT4 INT32 INT64 BOOL": ("Constant ConstantOfShape"),
    "FP32 FP16 BF16 INT8 FP8": ("Attention"),
    "INT8 FP8 FP4 INT4": ("DequantizeLinear"),
    "FP32 FP16 BF16 INT8 INT32 INT64": ("Gelu"),
    "FP32 FP16 BF16 FP8 INT32 INT64": ("Mean"),
    "FP32": ("STFT"),
    "FP32 FP16 BF16 INT32": ("TensorScatter"),
}
SUPPORTED: Mapping[str, tuple[str, ...]] = {
    op: tuple(types.split()) for types, ops in _BY_TYPES.items() for op in ops.split()
}
# What the documentation adds, in short.
LIMITS: Mapping[str, str] = {
    "Attention": "4-D; no past, present, nonpad_kv_seqlen or scores output; no softcap",
    "AveragePool": "2-D or 3-D; no dilations",
    "Constant": "no sparse values or strings",
    "CumSum": "the axis is known when the engine is built",
    "DeformConv": "1 or 2 spatial axes, the same pads at both ends",
    "DequantizeLinear": "zero point 0",
    "Dropout": "not training",
    "EyeLike": "fixed sizes",
    "GRU": "the same activations in both directions",
    "GridSample": "4-D",
    "Hardmax": "its axis is known when the engine is built",
    "If": "branches of the same rank, under other names",
    "LSTM": "the same activations in both directions; no input_forget, layout 0",
    "LayerNormalization": "the first output alone",
    "Loop": "no scan output of open length; what is carried keeps its shape",
    "LpPool": "no dilations",
    "MaxPool": "2-D or 3-D; no indices, no dilations",
    "OneHot": "the depth is known when the engine is built",
    "QuantizeLinear": "zero point 0",
    "RNN": "the same activations in both directions",
    "RandomNormal": "the seed is ignored",
    "RandomNormalLike": "the seed is ignored",
    "RandomUniform": "the seed is ignored",
    "RandomUniformLike": "the seed is ignored",
    "ReduceL1": "axes are an initializer",
    "ReduceL2": "axes are an initializer",
    "ReduceLogSum": "axes are an initializer",
    "ReduceLogSumExp": "axes are an initializer",
    "ReduceMax": "axes are an initializer",
    "ReduceMean": "axes are an initializer",
    "ReduceMin": "axes are an initializer",
    "ReduceProd": "axes are an initializer",
    "ReduceSum": "axes are an initializer",
    "ReduceSumSquare": "axes are an initializer",
    "Resize": "nearest or linear, stretched, without antialiasing; five coordinate modes",
    "RotaryEmbedding": "positions are INT64",
    "STFT": "step and window are initializers, the input is real",
    "ScatterND": "no reduction",
    "Squeeze": "axes are known when the engine is built",
    "TensorScatter": "4-D, axis -2",
    "TopK": "sorted, K below 3840",
    "Unsqueeze": "axes are known when the engine is built",
}
# Those that `operators` tests in a graph; a use of any other restricted operator is listed with its note.
CHECKED = frozenset(
    {"Attention", "CumSum", "DequantizeLinear", "LayerNormalization", "Squeeze", "TensorScatter"}
    | {"Unsqueeze", *(op for op in LIMITS if op.startswith("Reduce"))}
)
