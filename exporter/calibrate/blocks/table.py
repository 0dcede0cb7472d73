"""Which file computes the blocks of which kind of decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exporter.calibrate.blocks.base import Blocks
from exporter.calibrate.blocks.gated import GatedBlocks
from exporter.calibrate.blocks.gpt2 import Gpt2Blocks
from exporter.calibrate.blocks.llama import LlamaBlocks
from exporter.calibrate.blocks.opt import OptBlocks
from exporter.calibrate.blocks.phi import PhiBlocks
from exporter.calibrate.blocks.post_norm import PostNormBlocks
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.gpt2 import Gpt2Spec
from exporter.families.specs.idefics import GatedLlama
from exporter.families.specs.opt import OptSpec
from exporter.families.specs.phi import PhiSpec
from exporter.families.specs.post_norm import PostNormDecoder
from exporter.families.specs.walked import require_walked

# The first argument is a spec of the row's own kind, hence Any.
Open = Callable[[Any, Checkpoint, Sequence[EmbeddedPrompt]], Blocks]
BLOCKS: Mapping[type, Open] = {
    DecoderSpec: LlamaBlocks,
    PhiSpec: PhiBlocks,
    OptSpec: OptBlocks,
    Gpt2Spec: Gpt2Blocks,
    PostNormDecoder: PostNormBlocks,
    GatedLlama: GatedBlocks,
}


def open_blocks(
    checkpoint: Checkpoint, spec: TextDecoder, prompts: Sequence[EmbeddedPrompt]
) -> Blocks:
    """The blocks of any kind. Raises `InputRefused` for a kind that has none, and when the prompts
    are not those of the decoder's family.
    """
    require_walked(spec, "calibration")
    return BLOCKS[type(spec)](spec, checkpoint, prompts)
