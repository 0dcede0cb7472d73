"""Which device a graph runs on, and the proof that it does: onnxruntime's own record of its nodes.

onnxruntime puts what a provider cannot run on the CPU and says nothing. Its option
``session.disable_cpu_ep_fallback`` refuses a session with any node on the CPU, and with that also
those that belong there: what computes with shapes (Shape and what follows it) is put on the CPU by
design, because its results are read on the host. So the option is set for graphs that compute with no
shapes, and for all graphs each node's provider is read back and held against a list of operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from exporter.core.errors import EnvironmentLacks, InputRefused

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
RECORD = "session.record_ep_graph_assignment_info"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
# Only these may be on the CPU, and only in a graph with Shape or Size. The CUDA provider has float
# kernels for each but ReduceProd, so that one is on the CPU because its input is there, never for
# want of a kernel; float tensors of a model do not get there (float16 ones never, see
# onnxruntime/core/framework/fallback_cpu_capability.cc).
SHAPE_OPERATORS = frozenset(
    {
        "Add", "Cast", "Concat", "Div", "Equal", "Gather", "Max", "Min", "Mul", "Neg", "Range",
        "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip
BESIDE = "onnxruntime-gpu is installed beside onnxruntime, which hides it"
SHAPE_SOURCES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Placement:
    """How many nodes of each operator (``domain::Op`` beyond ai.onnx) each provider got."""

    nodes: Mapping[str, Mapping[str, int]]

    def count(self, provider: str) -> int:
        """Nodes on `provider`."""
        return sum(self.nodes.get(provider, {}).values())

    def fallen(self) -> dict[str, int]:
        """Operators that are on the CPU and do not compute with shapes, with their counts."""
        here = self.nodes.get(CPU, {})
        return {op: n for op, n in sorted(here.items()) if op not in SHAPE_OPERATORS}


def require_cuda(runtime: Any) -> None:
    """Raise `EnvironmentLacks` unless `runtime` (the module onnxruntime) has the CUDA provider."""
    providers = list(runtime.get_available_providers())
    if CUDA in providers:
        return
    both = f"{BESIDE}; " if both_installed() else ""
    raise EnvironmentLacks(
        f"--device cuda: onnxruntime {runtime.__version__} has the providers "
        f"{', '.join(providers)} (`medexport doctor` lists them), expected {CUDA}; {both}"
        "pip uninstall onnxruntime, then pip install 'medexport[gpu]' (onnxruntime-gpu)"
    )


def require_used(session: Any, name: str, lacking: str = "") -> None:
    """Raise `EnvironmentLacks` when a session that was asked for CUDA does not have it; `lacking` is
    what is known of the reason.

    onnxruntime drops a provider whose libraries or driver are missing, with a line in its log.
    """
    found = list(session.get_providers())
    if CUDA not in found:
        raise EnvironmentLacks(
            f"{name}: asked for {CUDA}, got {', '.join(found)}; the NVIDIA driver (`nvidia-smi`), or CUDA "
            f"or cuDNN of the version that onnxruntime-gpu was built for, is missing. {lacking}".rstrip()
        )


def read_placement(session: Any) -> Placement:
    """Where onnxruntime put each node, from a session opened with the option `RECORD`.

    Raises `EnvironmentLacks` for an onnxruntime that keeps no such record.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise EnvironmentLacks(
            "this onnxruntime does not say on which device a node runs; pip install --upgrade "
            "'medexport[gpu]'"
        )
    nodes: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts = nodes.setdefault(part.ep_name, Counter())
        for node in part.get_nodes():
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
            counts[f"{domain}{node.op_type}"] += 1
    return Placement(nodes)


def check_placement(placement: Placement, operators: Mapping[str, int], name: str) -> None:
    """Raise `InputRefused` when a node that is no shape arithmetic is on the CPU.

    `operators` are the graph's own: without Shape or Size among them nothing belongs on the CPU.
    """
    if not placement.count(CUDA):
        raise InputRefused(
            f"{name}: onnxruntime put none of its {placement.count(CPU)} nodes on the GPU; this graph "
            "cannot be run with --device cuda, use --device cpu"
        )
    fallen: Mapping[str, int] = placement.fallen()
    if not SHAPE_SOURCES & operators.keys():
        fallen = placement.nodes.get(CPU, {})
    if fallen:
        raise InputRefused(
            f"{name}: onnxruntime put {_listed(fallen)} on the CPU, expected all but shape arithmetic "
            "on the GPU; build the model with --compute float16, or use --device cpu"
        )


def no_shapes(operators: Mapping[str, int]) -> bool:
    """Whether a graph may be held to "nothing at all on the CPU" by onnxruntime itself."""
    return not SHAPE_SOURCES & operators.keys()


def cuda_providers(device_id: int = 0) -> Sequence[tuple[str, dict[str, str]]]:
    """The provider list of a CUDA session.

    The arena grows by what is asked for, so that what the driver reports is near to what is used.
    float32 stays float32: by default Ampere and later round the inputs of a product to TF32.
    Convolutions are not searched anew for each number of tiles.
    """
    settings = {
        "device_id": str(device_id),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [(CUDA, settings)]


def both_installed() -> bool:
    """Whether the packages onnxruntime and onnxruntime-gpu are both there: one import hides the other."""
    try:
        return bool(version("onnxruntime") and version("onnxruntime-gpu"))
    except PackageNotFoundError:
        return False


def _listed(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {op}" for op, n in operators.items())
