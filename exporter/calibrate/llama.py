"""A Llama or Qwen2 decoder block as a function of its weights, in torch float32.

The weights come in as a mapping, so that one block at a time can be held in memory and single
matrices can be replaced. Equal to transformers' LlamaDecoderLayer (test_llama.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused, require
from exporter.families.base import DecoderSpec

if TYPE_CHECKING:
    import torch

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
OUT = ("self_attn.o_proj.weight",)
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
DOWN = ("mlp.down_proj.weight",)
# Matrices that multiply the same input, in the order in which a block uses them.
GROUPS: tuple[tuple[str, ...], ...] = (QKV, OUT, GATE_UP, DOWN)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

Observer = Callable[[tuple[str, ...], "torch.Tensor"], None]


def use_torch(threads: int) -> None:
    """Set torch's threads. Raises `EnvironmentLacks` without torch."""
    require("torch", "build")
    import torch

    torch.set_num_threads(threads)


def block_names(spec: DecoderSpec, layer: int) -> tuple[str, ...]:
    """Checkpoint names of every tensor of block `layer`: norms, matrices as used, then biases."""
    prefix = block_prefix(spec, layer)
    biases = map(_bias, QKV) if spec.qkv_bias else ()
    return tuple(prefix + n for n in (*NORMS, *(n for group in GROUPS for n in group), *biases))


def block_prefix(spec: DecoderSpec, layer: int) -> str:
    """What precedes ``self_attn.q_proj.weight`` in the names of block `layer`."""
    return f"{spec.prefix}layers.{layer}."


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich 2019): ``x / rms(x) * weight``."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary_tables(spec: DecoderSpec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[length, head_dim]`` of positions 0, 1, ... (Su et al. 2021).

    Both halves of a head have the same angles, as in transformers' Llama.
    """
    import torch

    angles = torch.outer(torch.arange(length).float(), _frequencies(spec))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def axis_tables(
    spec: DecoderSpec, positions: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[length, head_dim]`` of positions on several axes, int64 ``[axes, length]``:
    the frequencies of section k turn with axis k (M-RoPE, arXiv 2409.12191).
    """
    import torch

    owner = torch.repeat_interleave(torch.arange(len(spec.mrope)), torch.tensor(spec.mrope))
    angles = torch.from_numpy(positions).float()[owner].T * _frequencies(spec)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _frequencies(spec: DecoderSpec) -> torch.Tensor:
    """Radians per position ``[head_dim / 2]``."""
    import torch

    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    return 1.0 / spec.rope_theta**exponents


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

    see = observe or _ignore
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


def _ignore(group: tuple[str, ...], x: torch.Tensor) -> None:
    """An `Observer` that notes nothing."""


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
    q, k = (t * cos + _rotate_half(t) * sin for t in (q, k))
    groups = spec.heads // spec.kv_heads
    k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return out[0].transpose(0, 1).reshape(length, -1)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
