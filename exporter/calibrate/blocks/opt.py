"""An OPT decoder block: layer norms before attention and MLP, ReLU, learned positions.

Equal to transformers' OPTDecoderLayer (test_block_kinds.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.blocks.base import (
    Group,
    Observer,
    attend,
    heads_of,
    ignore,
    layer_norm,
    linear,
    placed,
)
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.tensors import Checkpoint
from exporter.families.specs.opt import NORM_EPS, POSITION_OFFSET, OptSpec

if TYPE_CHECKING:
    import torch

PARTS = tuple(f"self_attn.{part}_proj" for part in "qkv")
QKV = tuple(f"{part}.weight" for part in PARTS)
OUT, UP, DOWN = ("self_attn.out_proj.weight",), ("fc1.weight",), ("fc2.weight",)


class OptBlocks:
    """See `Blocks`."""

    def __init__(
        self, spec: OptSpec, checkpoint: Checkpoint, prompts: Sequence[EmbeddedPrompt]
    ) -> None:
        self._spec, self._prompts = spec, prompts
        self._positions = checkpoint.float32(spec.positions)[POSITION_OFFSET:]

    def groups(self, layer: int) -> tuple[Group, ...]:  # noqa: ARG002 (all are alike)
        """See `Blocks`."""
        return QKV, OUT, UP, DOWN

    def begin(self, number: int) -> NDArray[np.float32]:
        """See `Blocks`."""
        return placed(self._prompts[number], self._positions)

    def run(
        self,
        layer: int,  # noqa: ARG002
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        number: int,  # noqa: ARG002 (a prompt is its hidden states)
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `Blocks`."""
        see = observe or ignore
        x = layer_norm(weights, "self_attn_layer_norm", hidden, NORM_EPS)
        see(QKV, x)
        q, k, v = (heads_of(linear(weights, part, x), self._spec.head_dim) for part in PARTS)
        x = attend(q, k, v, causal=True)
        see(OUT, x)
        hidden = hidden + linear(weights, "self_attn.out_proj", x)
        x = layer_norm(weights, "final_layer_norm", hidden, NORM_EPS)
        see(UP, x)
        x = linear(weights, "fc1", x).relu()
        see(DOWN, x)
        return hidden + linear(weights, "fc2", x)
