"""The blocks of each kind of decoder as calibration walks them: which tensors, and which inputs it sees.

A kind has a row here, its arithmetic in `calibrate.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec, TensorSpec
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.gpt2 import Gpt2Spec
from exporter.families.specs.idefics import GatedLlama
from exporter.families.specs.llama import NO_CALIBRATION, require_llama
from exporter.families.specs.opt import OptSpec
from exporter.families.specs.phi import PhiSpec
from exporter.families.specs.post_norm import PostNormDecoder

# What the names of a block's tensors begin with; the argument is a spec of the row's own kind.
Starts = Callable[[Any, int], tuple[str, ...]]
# Behind a block of another kind: GPTQ needs nothing but the inputs, AWQ also what they come from.
GPTQ_INSTEAD = "use int4-gptq, int4-hqq or int4-rtn"
# Queries read the text and keys and values the image: no inputs belong to the whole matrix.
TWO_INPUTS = "multihead_attn.in_proj_weight"


def _gated(spec: GatedLlama, layer: int) -> tuple[str, ...]:
    """A Llama block, and the gated one that stands before it."""
    own = (f"{spec.llama.prefix}layers.{layer}.",)
    return own if layer % spec.interval else (spec.gated(layer // spec.interval), *own)


STARTS: Mapping[type, Starts] = {
    DecoderSpec: lambda spec, layer: (f"{spec.prefix}layers.{layer}.",),
    PhiSpec: lambda spec, layer: (f"{spec.prefix}blocks.{layer}.",),
    OptSpec: lambda spec, layer: (spec.block(layer),),
    Gpt2Spec: lambda spec, layer: (spec.block(layer),),
    PostNormDecoder: lambda spec, layer: (spec.layer(layer),),
    GatedLlama: _gated,
}


def walked_kind(decoder: TextDecoder) -> bool:
    """Whether calibration knows the decoder's blocks."""
    return type(decoder) in STARTS


def require_walked(decoder: TextDecoder, what: str) -> None:
    """Raise `InputRefused` when calibration does not know the decoder's blocks, which `what` needs."""
    if not walked_kind(decoder):
        raise InputRefused(
            f"{what} walks the decoder block by block, and the blocks of a {type(decoder).__name__} "
            f"are not known to it; {NO_CALIBRATION}"
        )


def require_folding(decoder: TextDecoder, what: str) -> DecoderSpec:
    """The decoder as the Llama kind, for `what` that moves scales between its layers.

    Raises `InputRefused` when it is another, with the schemes that work for it.
    """
    instead = GPTQ_INSTEAD if walked_kind(decoder) else NO_CALIBRATION
    return require_llama(decoder, what, instead=instead)


def block_prefix(decoder: TextDecoder, layer: int) -> str:
    """What the names of all tensors of block `layer` begin with."""
    starts = STARTS[type(decoder)](decoder, layer)
    if len(starts) == 1:
        return starts[0]
    first, second = starts
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: first.rfind(".", 0, same) + 1]


def block_tensors(decoder: TextDecoder, layer: int) -> tuple[TensorSpec, ...]:
    """The decoder's tensors that belong to block `layer`, in the order of its `tensors`."""
    starts = STARTS[type(decoder)](decoder, layer)
    return tuple(t for t in decoder.tensors() if t.name.startswith(starts))


def seen_matrices(decoder: TextDecoder) -> frozenset[str]:
    """Names of the linear layers whose inputs calibration sees; none for a kind that it does not know."""
    if not walked_kind(decoder):
        return frozenset()
    starts = tuple(s for i in range(decoder.layers) for s in STARTS[type(decoder)](decoder, i))
    return frozenset(
        t.name
        for t in decoder.tensors()
        if t.role == "decoder" and t.name.startswith(starts) and not t.name.endswith(TWO_INPUTS)
    )
