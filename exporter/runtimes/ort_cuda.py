"""Opens sessions on an NVIDIA GPU, and refuses any that would run on the CPU in part."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes.onnx_scan import FLOAT, GraphFacts, scan_graph
from exporter.runtimes.ort_memory import DeviceMemory, Setup, host_setup
from exporter.runtimes.ort_session import FAILURES, session_options
from exporter.runtimes.providers import (
    NO_FALLBACK,
    RECORD,
    Device,
    check_placement,
    cuda_providers,
    no_shapes,
    read_placement,
    require_cuda,
    require_used,
)

ATTENTION = "com.microsoft::GroupQueryAttention"
WARNING, FATAL = 2, 4  # onnxruntime's log levels; the first is its default
# What a provider says: its own failures and, where it cannot be made at all, C++'s runtime_error.
GPU_FAILURES = (*FAILURES, state.EPFail, RuntimeError, ValueError)
# No kernel in the CUDA provider (onnxruntime docs/OperatorKernels.md).
MISSING = {
    "com.microsoft::MatMulIntegerToFloat": "int8-static is for CPUs; build int8 for this GPU",
}
# The smallest graph, y = Relu(x), opset 14: says whether the provider can be made at all.
PROBE = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x0e"
)


def device_setup(device: Device) -> Setup:
    """The setup for "cpu" or "cuda". Raises `EnvironmentLacks` without a GPU that works."""
    if device == "cpu":
        return host_setup()
    require_cuda(ort)
    require_working(ort)
    return Setup(open_cuda_session, DeviceMemory("cuda", 0))


def require_working(runtime: Any) -> None:
    """Raise `EnvironmentLacks` when the provider is there and its driver or libraries are not.

    Before any model is loaded, so that a missing libcudnn is not taken for a fault of a graph.
    """
    # Libraries from pip's nvidia packages; what it cannot find it prints.
    printed = StringIO()
    with redirect_stdout(printed):
        runtime.preload_dlls()
    lacking = printed.getvalue().partition("\n")[0]
    options = runtime.SessionOptions()
    options.log_severity_level = FATAL
    runtime.set_default_logger_severity(FATAL)  # what is wrong is said once, by the error
    try:
        session = runtime.InferenceSession(
            PROBE, options, providers=cuda_providers(), enable_fallback=0
        )
    except GPU_FAILURES as error:
        built = getattr(runtime, "cuda_version", "") or "not said"
        said = " ".join(str(error).split())[-200:]  # the reason stands at the end
        raise EnvironmentLacks(
            f"onnxruntime {runtime.__version__}, built for CUDA {built}, cannot use the GPU ({said}); "
            "see `nvidia-smi`"
        ) from error
    finally:
        runtime.set_default_logger_severity(WARNING)
    require_used(session, f"onnxruntime {runtime.__version__}", lacking)


def open_cuda_session(path: Path, threads: int) -> ort.InferenceSession:
    """A session for `path` whose nodes are all on the first GPU but for shape arithmetic.

    Raises `EnvironmentLacks` without provider, driver or libraries, `InputRefused` for a graph that
    CUDA cannot run as a whole.
    """
    facts = scan_graph(path)
    check_graph(facts, path.name)
    options = session_options(threads)
    options.add_session_config_entry(RECORD, "1")
    if no_shapes(facts.operators):
        options.add_session_config_entry(NO_FALLBACK, "1")
    session = _open(path, options)
    require_used(session, path.name)
    check_placement(read_placement(session), facts.operators, path.name)
    return session


def check_graph(facts: GraphFacts, name: str) -> None:
    """Raise `InputRefused` for what the CUDA provider is known to have no kernel for."""
    for operator, advice in MISSING.items():
        if operator in facts.operators:
            raise InputRefused(
                f"{name}: {operator} has no kernel in onnxruntime's CUDA provider; {advice}"
            )
    floats = [n for n, kind in facts.inputs.items() if n.startswith("past_") and kind == FLOAT]
    if ATTENTION in facts.operators and floats:
        raise InputRefused(
            f"{name}: computes in float32, and onnxruntime's CUDA kernels of GroupQueryAttention take "
            "float16; build the model with --compute float16, or use --device cpu"
        )


def _open(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    providers: Any = cuda_providers()
    try:
        # With its own fallback onnxruntime would try a failed session or run again on the CPU.
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except GPU_FAILURES as error:
        said = " ".join(str(error).split())[:300]
        if "fallback to CPU EP has been explicitly disabled" in said:
            raise InputRefused(
                f"{path.name}: onnxruntime {ort.__version__} would run nodes of it on the CPU, expected "
                "all on the GPU; build the model with --compute float16, or use --device cpu"
            ) from error
        if "CUDA" in said or "cuda" in said:
            raise EnvironmentLacks(
                f"{path.name}: the GPU refused ({said}); see `nvidia-smi` and `medexport doctor`"
            ) from error
        raise InputRefused(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({said})"
        ) from error
