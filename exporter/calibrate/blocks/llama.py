"""A Llama or Qwen2 decoder block as a function of its weights, in torch float32.

The weights come in as a mapping, so that one block at a time can be held in memory and single
matrices can be replaced. Equal to transformers' LlamaDecoderLayer (test_llama.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.blocks.base import Group, Observer, ignore
from exporter.calibrate.blocks.rotary import frequencies, tables_of, turned
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec

if TYPE_CHECKING:
    import torch

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
OUT = ("self_attn.o_proj.weight",)
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
DOWN = ("mlp.down_proj.weight",)
# Matrices that multiply the same input, in the order in which a block uses them.
GROUPS: tuple[Group, ...] = (QKV, OUT, GATE_UP, DOWN)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich 2019): ``x / rms(x) * weight``."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary_tables(spec: DecoderSpec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[length, head_dim]`` of positions 0, 1, ... (Su et al. 2021).

    Both halves of a head have the same angles, as in transformers' Llama.
    """
    import torch

    return tables_of(torch.arange(length), frequencies(spec.head_dim, spec.rope_theta))


def axis_tables(
    spec: DecoderSpec, positions: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[length, head_dim]`` of positions on several axes, int64 ``[axes, length]``:
    the frequencies of section k turn with axis k (M-RoPE, arXiv 2409.12191).
    """
    import torch

    owner = torch.repeat_interleave(torch.arange(len(spec.mrope)), torch.tensor(spec.mrope))
    angles = torch.from_numpy(positions).float()[owner].T
    angles = angles * frequencies(spec.head_dim, spec.rope_theta)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Rotary:
    """The tables of each prompt: one for all where a position is the place in the text."""

    def __init__(
        self,
        spec: DecoderSpec,
        lengths: Sequence[int],
        positions: Sequence[NDArray[np.int64] | None],
    ) -> None:
        """By prompt its length and its positions ``[axes, length]``.

        Raises `InputRefused` when the decoder needs positions that a prompt does not have.
        """
        axes = len(spec.mrope)
        self._spec = spec
        self._positions = [p for p in positions if p is not None and len(p) == axes]
        if axes and len(self._positions) != len(positions):
            raise InputRefused(
                f"a prompt lacks positions on {axes} axes; expected prompts of the model's family"
            )
        self._shared = None if axes else rotary_tables(spec, max(lengths))

    def tables(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of prompt `number`, of its length at least."""
        if self._shared is not None:
            return self._shared
        return axis_tables(self._spec, self._positions[number])


class LlamaBlocks:
    """See `Blocks`."""

    def __init__(
        self,
        spec: DecoderSpec,
        checkpoint: Checkpoint,  # noqa: ARG002 (no learned positions)
        prompts: Sequence[EmbeddedPrompt],
    ) -> None:
        """Raises `InputRefused` when a prompt lacks the positions that the decoder needs."""
        self._spec, self._prompts = spec, prompts
        self._rotary = Rotary(spec, [p.length for p in prompts], [p.positions for p in prompts])

    def groups(self, layer: int) -> tuple[Group, ...]:  # noqa: ARG002 (all are alike)
        """See `Blocks`."""
        return GROUPS

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
        return run_block(self._spec, weights, hidden, self._rotary.tables(number), observe)


def run_block(
    spec: DecoderSpec,
    weights: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    observe: Observer | None = None,
) -> torch.Tensor:
    """Hidden states ``[S, H]`` after one block of causal attention and a SiLU-gated MLP.

    `weights` is by the names of `GROUPS`, `NORMS` and biases, without a prefix; `tables` are
    cosines and sines of at least S positions. `observe` is called with each group and its input
    ``[S, K]`` before the group is used.
    """
    import torch.nn.functional as F  # noqa: N812 (its usual name)

    see = observe or ignore
    x = rms_norm(hidden, weights[NORMS[0]], spec.norm_eps)
    see(QKV, x)
    x = _attend(spec, weights, x, tables)
    see(OUT, x)
    hidden = hidden + F.linear(x, weights[OUT[0]])
    x = rms_norm(hidden, weights[NORMS[1]], spec.norm_eps)
    see(GATE_UP, x)
    x = F.silu(F.linear(x, weights[GATE_UP[0]])) * F.linear(x, weights[GATE_UP[1]])
    see(DOWN, x)
    return hidden + F.linear(x, weights[DOWN[0]])


def _attend(
    spec: DecoderSpec,
    weights: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Grouped-query causal attention of ``[S, H]`` before the output matrix."""
    import torch.nn.functional as F  # noqa: N812

    length = x.shape[0]
    biases = [weights[_bias(name)] if spec.qkv_bias else None for name in QKV]
    q, k, v = (
        F.linear(x, weights[name], bias).view(length, -1, spec.head_dim).transpose(0, 1)
        for name, bias in zip(QKV, biases, strict=True)
    )
    cos, sin = (table[:length] for table in tables)
    q, k = (turned(t, cos, sin) for t in (q, k))
    groups = spec.heads // spec.kv_heads
    k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return out[0].transpose(0, 1).reshape(length, -1)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"
