"""Tensors of layers that architectures of many kinds have."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.families.base import BIAS, PATCHES, POSITIONS, Role, TensorSpec, VitSpec

CLASS_TOKEN = "class token: added, not multiplied"  # noqa: S105 (no secret)
CONVOLUTION = "convolution: its input is not one row of a matrix product"
STATISTICS = "batch norm: few bytes, large effect"


def linear_tensors(name: str, outputs: int, inputs: int, role: Role) -> Iterator[TensorSpec]:
    """Weight and bias of a linear layer called `name`."""
    yield TensorSpec(f"{name}.weight", (outputs, inputs), role)
    yield TensorSpec(f"{name}.bias", (outputs,), reason=BIAS)


def attention_tensors(name: str, width: int, role: Role) -> Iterator[TensorSpec]:
    """``torch.nn.MultiheadAttention`` called `name`: queries, keys and values are one matrix."""
    yield TensorSpec(f"{name}.in_proj_weight", (3 * width, width), role)
    yield TensorSpec(f"{name}.in_proj_bias", (3 * width,), reason=BIAS)
    yield from linear_tensors(f"{name}.out_proj", width, width, role)


def fused_block_shapes(
    hidden: int, inner: int, packed: str, out: str
) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of a transformer's block in the order of use: `packed`
    gives queries, keys and values behind each other, `out` is behind the attention.
    """
    return {
        packed: (3 * hidden, hidden),
        out: (hidden, hidden),
        "mlp.fc1": (inner, hidden),
        "mlp.fc2": (hidden, inner),
    }


def class_token_and_patch_tensors(token: str, table: str, tower: VitSpec) -> Iterator[TensorSpec]:
    """The class token, the positions of it and of the patches (whole names), and the patch convolution
    of a vision transformer.
    """
    hidden, side, patch = tower.hidden_size, tower.patch_size, tower.prefix + tower.names.patch
    yield TensorSpec(token, (1, 1, hidden), reason=CLASS_TOKEN)
    yield TensorSpec(table, (1, tower.patches**2 + 1, hidden), reason=POSITIONS)
    yield TensorSpec(f"{patch}.weight", (hidden, 3, side, side), reason=PATCHES)
    yield TensorSpec(f"{patch}.bias", (hidden,), reason=BIAS)


def convolution_tensor(name: str, outputs: int, inputs: int, side: int) -> TensorSpec:
    """The kernel of a convolution called `name`, which has no bias."""
    return TensorSpec(f"{name}.weight", (outputs, inputs, side, side), reason=CONVOLUTION)


def batch_norm_tensors(name: str, size: int) -> Iterator[TensorSpec]:
    """Weight, bias, mean and variance of a batch norm called `name`."""
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield TensorSpec(f"{name}.{part}", (size,), reason=STATISTICS)
