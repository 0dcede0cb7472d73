"""Rounding to float16, in torch: its size per value, random changes of that size, and the check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from exporter.adapters.base import BaseModel
from exporter.core.errors import ParityFailed
from exporter.core.tensors import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float16 has 10 stored bits: a step is 2**(exponent - 10), and 2**-24 below 2**-14.
STORED_BITS, LOWEST_EXPONENT = 10, -14
# Sums of a merge in another order differ by float32 rounding, relative to the largest value in play.
FLOAT32_SLACK = 2.0**-20


def half_step(values: torch.Tensor) -> torch.Tensor:
    """The largest rounding error of each float32 value in float16: half the distance of its neighbours."""
    exponent = torch.frexp(values).exponent - 1
    # frexp gives zero the exponent of 0.5.
    exponent = torch.where(values == 0, LOWEST_EXPONENT, exponent)
    exponent = exponent.clamp(min=LOWEST_EXPONENT)
    return torch.ldexp(torch.ones_like(values), exponent - STORED_BITS - 1)


def perturb(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`values`, each moved by an amount drawn evenly from what rounding to float16 may move it.

    Zeros stay: float16 holds them exactly.
    """
    noise = torch.rand(values.shape, generator=generator) * 2 - 1
    return values + noise * half_step(values) * (values != 0)


def rounding_steps(name: str, merged: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest distance of `merged` from `exact` in float16 steps; 0.5 when it is its rounding.

    Raises `ParityFailed` when a value lies further off than rounding and float32 sums explain.
    """
    if merged.shape != exact.shape:
        raise ParityFailed(
            f"merged tensor '{name}' is {list(merged.shape)}, peft's is {list(exact.shape)}"
        )
    exact = exact.detach().float()
    distance = (merged.float() - exact).abs()
    half = half_step(exact)
    slack = FLOAT32_SLACK * float(exact.abs().max()) if exact.numel() else 0.0
    if bool((distance > half * 1.01 + slack).any()):
        worst = float((distance / half).max() / 2)
        raise ParityFailed(
            f"merged tensor '{name}' is {worst:.3g} float16 steps from peft's merge; expected 0.5 "
            "(rounding): the merge is not the adapter's, report it"
        )
    return float(((distance - slack).clamp(min=0) / half).max() / 2) if exact.numel() else 0.0


def check_rounded(reference: PreTrainedModel, stored: Checkpoint, base: BaseModel) -> float:
    """Compare all merged tensors with peft's float32 merge; returns the largest distance in steps.

    Raises `ParityFailed` for a value that is not its rounding, or a tensor that only one side has.
    """
    parameters = dict(reference.named_parameters())
    names = {base.layout.canonical(name): name for name in stored.tensors}
    missing = sorted(parameters.keys() - names.keys() - {base.layout.head})
    headless = base.layout.head and base.layout.head not in names and not base.tied
    if missing or headless:
        raise ParityFailed(f"merged model lacks {missing or base.layout.head}; merge it again")
    worst = 0.0
    for name, exact in parameters.items():
        # A head that is stored once is the embedding.
        stored_name = names.get(name, names[base.layout.embedding])
        merged = torch.from_numpy(stored.float32(stored_name))
        worst = max(worst, rounding_steps(name, merged, exact))
    return worst
