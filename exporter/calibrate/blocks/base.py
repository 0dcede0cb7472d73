"""What the walk knows of a decoder's blocks, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.errors import InputRefused, require

if TYPE_CHECKING:
    import torch

# Matrices that multiply the same input, by their names within the block.
Group = tuple[str, ...]
Observer = Callable[[Group, "torch.Tensor"], None]


class Blocks(Protocol):
    """The blocks of one decoder on its calibration prompts, as functions of their weights.

    Weights are float32 by their names within the block (what follows `walked.block_prefix`); matrices
    are ``[outputs, inputs]`` for all layers, however the checkpoint has them.
    """

    def groups(self, layer: int) -> tuple[Group, ...]:
        """The groups of block `layer` that `run` shows, in the order of use."""
        ...

    def begin(self, number: int) -> NDArray[np.float32]:
        """What block 0 reads of prompt `number`, ``[S, H]``: embeddings with learned positions."""
        ...

    def run(
        self,
        layer: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        number: int,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[S, H]`` of prompt `number` after block `layer`.

        `observe` is called with each group and its input ``[S, K]`` before the group is used.
        """
        ...


def use_torch(threads: int) -> None:
    """Set torch's threads. Raises `EnvironmentLacks` without torch."""
    require("torch", "build")
    import torch

    torch.set_num_threads(threads)


def ignore(group: Group, x: torch.Tensor) -> None:
    """An `Observer` that notes nothing."""


def linear(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """``x W^T + b`` with the layer `name`."""
    import torch.nn.functional as F  # noqa: N812 (its usual name)

    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def layer_norm(
    weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, eps: float
) -> torch.Tensor:
    """Layer norm `name` over the last axis (arXiv 1607.06450)."""
    import torch.nn.functional as F  # noqa: N812

    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def heads_of(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows ``[S, heads * head_dim]`` as ``[heads, S, head_dim]``."""
    return x.reshape(x.shape[0], -1, head_dim).transpose(0, 1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of heads ``[heads, S, head_dim]`` as rows ``[S, heads * head_dim]``.

    `mask`: bool ``[S, rows]``, or what is added to the scores.
    """
    import torch.nn.functional as F  # noqa: N812

    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=causal
    )
    return out[0].transpose(0, 1).reshape(q.shape[1], -1)


def placed(prompt: EmbeddedPrompt, table: NDArray[np.float32]) -> NDArray[np.float32]:
    """A prompt's embeddings with the learned positions ``[positions, H]`` added."""
    return np.asarray(prompt.embeds + table[: prompt.length], np.float32)


def require_cross(prompts: Sequence[EmbeddedPrompt], count: int) -> None:
    """Raise `InputRefused` when a prompt has not keys and values of `count` cross-attentions."""
    lacking = [p for p in prompts if len(p.cross) != 2 * count]
    if lacking:
        raise InputRefused(
            f"a prompt has keys and values of {len(lacking[0].cross) // 2} cross-attentions; expected "
            f"{count}: prompts of the model's family"
        )


def cross_of(prompt: EmbeddedPrompt, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[heads, rows, head_dim]`` that cross-attention `index` sees of the images."""
    import torch

    key, value = (torch.from_numpy(part) for part in prompt.cross[2 * index : 2 * index + 2])
    return key, value
