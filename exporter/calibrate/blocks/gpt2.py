"""A GPT-2 block with cross-attention: self-attention, the image's keys and values, MLP, each behind a norm.

Equal to transformers' GPT2Block (test_block_kinds.py). The image's keys and values come with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.blocks.base import (
    Group,
    Observer,
    attend,
    cross_of,
    heads_of,
    ignore,
    layer_norm,
    linear,
    placed,
    require_cross,
)
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.tensors import Checkpoint
from exporter.families.specs.gpt2 import Gpt2Spec

if TYPE_CHECKING:
    import torch

QKV, OUT = ("attn.c_attn.weight",), ("attn.c_proj.weight",)
QUERY, CROSS_OUT = ("crossattention.q_attn.weight",), ("crossattention.c_proj.weight",)
UP, DOWN = ("mlp.c_fc.weight",), ("mlp.c_proj.weight",)


class Gpt2Blocks:
    """See `Blocks`."""

    def __init__(
        self, spec: Gpt2Spec, checkpoint: Checkpoint, prompts: Sequence[EmbeddedPrompt]
    ) -> None:
        """Raises `InputRefused` when a prompt lacks the image's keys and values."""
        require_cross(prompts, spec.layers)
        self._spec, self._prompts = spec, prompts
        self._positions = checkpoint.float32(spec.positions)
        self._active = _activation(spec.activation)

    def groups(self, layer: int) -> tuple[Group, ...]:  # noqa: ARG002 (all are alike)
        """See `Blocks`."""
        return QKV, OUT, QUERY, CROSS_OUT, UP, DOWN

    def begin(self, number: int) -> NDArray[np.float32]:
        """See `Blocks`."""
        return placed(self._prompts[number], self._positions)

    def run(
        self,
        layer: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        number: int,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `Blocks`."""
        see, spec = observe or ignore, self._spec
        x = layer_norm(weights, "ln_1", hidden, spec.norm_eps)
        see(QKV, x)
        parts = linear(weights, "attn.c_attn", x).chunk(3, dim=-1)
        x = attend(*(heads_of(part, spec.head_dim) for part in parts), causal=True)
        see(OUT, x)
        hidden = hidden + linear(weights, "attn.c_proj", x)
        x = layer_norm(weights, "ln_cross_attn", hidden, spec.norm_eps)
        see(QUERY, x)
        queries = heads_of(linear(weights, "crossattention.q_attn", x), spec.head_dim)
        x = attend(queries, *cross_of(self._prompts[number], layer))
        see(CROSS_OUT, x)
        hidden = hidden + linear(weights, "crossattention.c_proj", x)
        x = layer_norm(weights, "ln_2", hidden, spec.norm_eps)
        see(UP, x)
        x = self._active(linear(weights, "mlp.c_fc", x))
        see(DOWN, x)
        return hidden + linear(weights, "mlp.c_proj", x)


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """One of `families.specs.gpt2.ACTIVATIONS`: GELU as it is, or by the hyperbolic tangent."""
    import torch.nn.functional as F  # noqa: N812 (its usual name)

    return F.gelu if name == "gelu" else partial(F.gelu, approximate="tanh")
