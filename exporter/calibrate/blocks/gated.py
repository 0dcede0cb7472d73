"""IDEFICS' blocks: a Llama block and, before every few of them, a gated one that sees the images.

A gated block is shown with the Llama block that it stands before. Equal to transformers'
IdeficsGatedCrossAttentionLayer and IdeficsDecoderLayer (test_block_kinds.py). The images' keys and
values come with the prompt.
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
    require_cross,
)
from exporter.calibrate.blocks.llama import DOWN, GATE_UP, NORMS, LlamaBlocks, rms_norm
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.specs.idefics import GatedLlama
from exporter.families.specs.walked import block_prefix

if TYPE_CHECKING:
    import torch

QUERY, OUT = ("cross_attn.q_proj.weight",), ("cross_attn.o_proj.weight",)
GROUPS: tuple[Group, ...] = (QUERY, OUT, GATE_UP, DOWN)


class GatedBlocks:
    """See `Blocks`."""

    def __init__(
        self, spec: GatedLlama, checkpoint: Checkpoint, prompts: Sequence[EmbeddedPrompt]
    ) -> None:
        """Raises `InputRefused` when a prompt lacks its images or says not which tokens see them."""
        require_cross(prompts, spec.gated_blocks)
        if any(p.image_mask is None for p in prompts):
            raise InputRefused(
                "a prompt does not say which tokens see its images; expected prompts of the model's "
                "family"
            )
        self._spec, self._prompts = spec, prompts
        self._llama = LlamaBlocks(spec.llama, checkpoint, prompts)

    def groups(self, layer: int) -> tuple[Group, ...]:
        """See `Blocks`."""
        own, before = self._starts(layer)
        gated = GROUPS if before else ()
        llama = self._llama.groups(layer)
        return (*(_named(before, g) for g in gated), *(_named(own, g) for g in llama))

    def begin(self, number: int) -> NDArray[np.float32]:
        """See `Blocks`."""
        return self._prompts[number].embeds

    def run(
        self,
        layer: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        number: int,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `Blocks`."""
        see = observe or ignore
        own, before = self._starts(layer)
        if before:
            block, gated = layer // self._spec.interval, _part(weights, before)
            hidden = self._gated(
                block, gated, hidden, self._prompts[number], lambda g, x: see(_named(before, g), x)
            )
        llama = _part(weights, own)
        return self._llama.run(layer, llama, hidden, number, lambda g, x: see(_named(own, g), x))

    def _starts(self, layer: int) -> tuple[str, str]:
        """What begins the names of the Llama block's tensors, and of the gated one's ("": none)."""
        spec = self._spec
        own = f"{spec.llama.prefix}layers.{layer}."
        if layer % spec.interval:
            return "", ""
        shared = block_prefix(spec, layer)
        before = spec.gated(layer // spec.interval)
        return own.removeprefix(shared), before.removeprefix(shared)

    def _gated(
        self,
        block: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        prompt: EmbeddedPrompt,
        see: Observer,
    ) -> torch.Tensor:
        """Cross-attention, then an MLP, each times the hyperbolic tangent of its gate."""
        import torch.nn.functional as F  # noqa: N812 (its usual name)

        eps = self._spec.llama.norm_eps
        x = rms_norm(hidden, weights[NORMS[0]], eps)
        see(QUERY, x)
        seen, open_ = self._visible(prompt)
        queries = heads_of(F.linear(x, weights[QUERY[0]]), self._spec.head_dim)
        if self._spec.qk_norms:
            queries = rms_norm(queries, weights["cross_attn.q_layer_norm.weight"], eps)
        x = attend(queries, *cross_of(prompt, block), mask=seen)
        see(OUT, x)
        hidden = hidden + F.linear(x, weights[OUT[0]]) * open_ * _gate(weights, "cross_attn")
        x = rms_norm(hidden, weights[NORMS[1]], eps)
        see(GATE_UP, x)
        x = F.silu(F.linear(x, weights[GATE_UP[0]])) * F.linear(x, weights[GATE_UP[1]])
        see(DOWN, x)
        return hidden + F.linear(x, weights[DOWN[0]]) * _gate(weights, "dense")

    def _visible(self, prompt: EmbeddedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the scores ``[S, images * latents]``, and ``[S, 1]``: 0 where a token sees
        no image.
        """
        import torch

        images = torch.from_numpy(np.asarray(prompt.image_mask, np.int64)) != 0
        rows = images.repeat_interleave(self._spec.latents, dim=1)
        lowest = torch.finfo(torch.float32).min
        return torch.where(rows, 0.0, lowest), images.any(dim=1, keepdim=True).float()


def _gate(weights: Mapping[str, torch.Tensor], part: str) -> torch.Tensor:
    return weights[f"alpha_{part}"].flatten().tanh()


def _named(start: str, group: Group) -> Group:
    return tuple(start + name for name in group)


def _part(weights: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
