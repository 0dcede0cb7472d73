"""Opens an onnxruntime session on the CPU with explicit settings."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from exporter.core.errors import InputRefused

FAILURES = (
    *(state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument),
    *(state.NoSuchFile, state.NotImplemented, state.RuntimeException, state.NoModel),
)


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """A session for `path` with `threads` threads inside an operator and one operator at a time.

    Threads do not spin while they wait: on a shared machine spinning takes the cores from others.
    Raises `InputRefused` in one line when the graph is missing or cannot be loaded.
    """
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected an exported graph")
    try:
        return ort.InferenceSession(
            str(path), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except FAILURES as error:
        raise InputRefused(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({' '.join(str(error).split())[:300]})"
        ) from error


def session_options(threads: int) -> ort.SessionOptions:
    """What sessions on all devices have in common."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A product with blocks behind DequantizeLinear is fused by default with inputs rounded to 8 bits;
    # a graph of standard operators says float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options
