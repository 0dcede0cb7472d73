"""A decoder layer of ``torch.nn``: norms behind self-attention, the image's keys and values, and the MLP.

Equal to torch.nn.TransformerDecoderLayer (test_block_kinds.py). The image's keys and values come with
the prompt; the matrix that gives them gives the queries too and is shown to no observer.
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
from exporter.families.specs.post_norm import NORM_EPS, PostNormDecoder

if TYPE_CHECKING:
    import torch

QKV, OUT = ("self_attn.in_proj_weight",), ("self_attn.out_proj.weight",)
CROSS_OUT = ("multihead_attn.out_proj.weight",)
UP, DOWN = ("linear1.weight",), ("linear2.weight",)


class PostNormBlocks:
    """See `Blocks`."""

    def __init__(
        self, spec: PostNormDecoder, checkpoint: Checkpoint, prompts: Sequence[EmbeddedPrompt]
    ) -> None:
        """Raises `InputRefused` when a prompt lacks the image's keys and values."""
        require_cross(prompts, spec.layers)
        self._spec, self._prompts = spec, prompts
        self._positions = checkpoint.float32(spec.positions)

    def groups(self, layer: int) -> tuple[Group, ...]:  # noqa: ARG002 (all are alike)
        """See `Blocks`."""
        return QKV, OUT, CROSS_OUT, UP, DOWN

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
        import torch.nn.functional as F  # noqa: N812 (its usual name)

        see, sizes = observe or ignore, self._spec.sizes
        see(QKV, hidden)
        parts = _projected(weights, "self_attn", hidden, 3 * sizes.hidden_size).chunk(3, dim=-1)
        x = attend(*(heads_of(part, sizes.head_dim) for part in parts), causal=True)
        see(OUT, x)
        x = hidden + linear(weights, "self_attn.out_proj", x)
        hidden = layer_norm(weights, "norm1", x, NORM_EPS)
        queries = _projected(weights, "multihead_attn", hidden, sizes.hidden_size)
        cross = cross_of(self._prompts[number], layer)
        x = attend(heads_of(queries, sizes.head_dim), *cross)
        see(CROSS_OUT, x)
        x = hidden + linear(weights, "multihead_attn.out_proj", x)
        hidden = layer_norm(weights, "norm2", x, NORM_EPS)
        see(UP, hidden)
        x = linear(weights, "linear1", hidden)
        x = F.gelu(x) if sizes.activation == "gelu" else x.relu()
        see(DOWN, x)
        return layer_norm(weights, "norm3", hidden + linear(weights, "linear2", x), NORM_EPS)


def _projected(
    weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, rows: int
) -> torch.Tensor:
    """Product with the first `rows` of the fused matrix of the attention `name`."""
    import torch.nn.functional as F  # noqa: N812

    weight, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    return F.linear(x, weight[:rows], bias[:rows])
