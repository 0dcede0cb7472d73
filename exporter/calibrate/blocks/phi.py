"""A Phi decoder block: one norm, attention and MLP beside each other, part of a head turned.

Equal to transformers' PhiDecoderLayer with the prefix mask of Moondream (test_block_kinds.py).
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
)
from exporter.calibrate.blocks.rotary import frequencies, tables_of, turned
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.tensors import Checkpoint
from exporter.families.specs.phi import PhiSpec

if TYPE_CHECKING:
    import torch

NORMED = ("attn.qkv.weight", "mlp.fc1.weight")
OUT, DOWN = ("attn.proj.weight",), ("mlp.fc2.weight",)


class PhiBlocks:
    """See `Blocks`."""

    def __init__(
        self,
        spec: PhiSpec,
        checkpoint: Checkpoint,  # noqa: ARG002 (no learned positions)
        prompts: Sequence[EmbeddedPrompt],
    ) -> None:
        import torch

        self._spec, self._prompts = spec, prompts
        longest = torch.arange(max(p.length for p in prompts))
        self._tables = tables_of(longest, frequencies(spec.rotary_dim, spec.rope_theta))

    def groups(self, layer: int) -> tuple[Group, ...]:  # noqa: ARG002 (all are alike)
        """See `Blocks`."""
        return NORMED, OUT, DOWN

    def begin(self, number: int) -> NDArray[np.float32]:
        """See `Blocks`."""
        return self._prompts[number].embeds

    def run(
        self,
        layer: int,  # noqa: ARG002
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        number: int,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `Blocks`."""
        import torch.nn.functional as F  # noqa: N812 (its usual name)

        see = observe or ignore
        x = layer_norm(weights, "ln", hidden, self._spec.norm_eps)
        see(NORMED, x)
        seen = self._attention(weights, x, self._prompts[number].prefix_length)
        wide = F.gelu(linear(weights, "mlp.fc1", x), approximate="tanh")
        see(OUT, seen)
        see(DOWN, wide)
        return hidden + linear(weights, "attn.proj", seen) + linear(weights, "mlp.fc2", wide)

    def _attention(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, prefix: int
    ) -> torch.Tensor:
        spec, length = self._spec, x.shape[0]
        parts = linear(weights, "attn.qkv", x).chunk(3, dim=-1)
        q, k, v = (heads_of(part, spec.head_dim) for part in parts)
        cos, sin = (table[:length] for table in self._tables)
        q, k = (turned(part, cos, sin) for part in (q, k))
        if not prefix:
            return attend(q, k, v, causal=True)
        return attend(q, k, v, mask=_prefix_mask(length, prefix))


def _prefix_mask(length: int, prefix: int) -> torch.Tensor:
    """Bool ``[length, length]``: all look back, and the first `prefix` see one another."""
    import torch

    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:prefix, :prefix] = True
    return seen
