"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves of a head turned together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def frequencies(width: int, theta: float) -> torch.Tensor:
    """Radians per position ``[width / 2]`` of the `width` values of a head that turn."""
    import torch

    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    return 1.0 / theta**exponents


def tables_of(positions: torch.Tensor, radians: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[length, width]`` of positions ``[length]``."""
    import torch

    angles = torch.outer(positions.float(), radians)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads ``[heads, S, head_dim]`` with their first values, as many as the tables have, turned."""
    import torch

    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos + _rotate_half(x) * sin
    turning, still = x[..., :width], x[..., width:]
    return torch.cat((turning * cos + _rotate_half(turning) * sin, still), dim=-1)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
