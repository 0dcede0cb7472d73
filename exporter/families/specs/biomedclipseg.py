"""BiomedCLIPSeg (arXiv 2308.07706): CLIPSeg's mask decoder over BiomedCLIP's encoders.

Published as code (github.com/naamiinepal/medvlsm) whose checkpoints hold transformers' CLIPSegDecoder
beside open_clip's BiomedCLIP. No weights are published: a state dictionary of a training run is
what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporter.families.base import Feed, TensorSpec
from exporter.families.images.clip import MEAN, STD
from exporter.families.layouts.biomedclip import TEXT_PREFIX, biomedclip_config
from exporter.families.specs.bert_towers import BertText
from exporter.families.specs.clip_tower import unused
from exporter.families.specs.clipseg import (
    EXTRACT,
    UNUSED_SCALE,
    MaskDecoder,
    extracted,
    mask_decoder,
    state_names,
)
from exporter.families.specs.examples import example_images
from exporter.families.specs.timm_vit import NAMES, TimmImage
from exporter.families.task_models.bert import bert_spec
from exporter.families.task_models.biomedclip import image_spec

MODEL_TYPE, CLASS = "biomedclipseg", "BiomedCLIPSeg"
PREFIX = "biomedclip."
# Of the training framework's checkpoints, whose module holds the network as `net`.
PUBLISHED_NAMES = (("net.biomedclip", "biomedclip"), ("net.decoder", "decoder"))
# The decoder is CLIPSeg rd64-refined's, whose tower's epsilon it takes.
DECODER = {
    "extract_layers": list(EXTRACT),
    "reduce_dim": 64,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 2048,
    "conditional_layer": 0,
    "use_complex_transposed_convolution": True,
}
DECODER_EPS = 1e-5
# Resized without keeping the shape, as torchvision resizes a Pillow image.
IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


@dataclass(frozen=True)
class TimmStates:
    """timm's vision transformer up to the last block whose states are read; `read`: those blocks."""

    image: TimmImage
    read: tuple[int, ...]
    logit_scale: str

    def outputs(self) -> tuple[str, ...]:
        """Names of the states that the graph gives, in the order of `read`."""
        return state_names(len(self.read))

    @property
    def used_layers(self) -> int:
        """Blocks that are computed."""
        return max(self.read) + 1

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the tower, and what only BiomedCLIP itself needs."""
        at = self.image.tower.prefix
        layers = range(self.used_layers, self.image.tower.layers)
        behind = [f"{at}{NAMES.blocks}{i}." for i in layers]
        behind += [f"{at}norm.", self.image.projection]
        for tensor in self.image.tensors():
            yield unused(tensor) if tensor.name.startswith(tuple(behind)) else tensor
        yield TensorSpec(self.logit_scale, (), reason=UNUSED_SCALE, used=False)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.image.tower.image_size, rng)


def biomedclipseg_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every size said: what it leaves out is as in the published code.

    Raises `InputRefused`.
    """
    whole = biomedclip_config(config)
    own = {key: config.get(key, value) for key, value in DECODER.items()}
    return {**whole, **own, "architectures": [CLASS], "model_type": MODEL_TYPE}


def states_spec(config: Mapping[str, Any]) -> TimmStates:
    """The image part of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = biomedclipseg_config(config)
    image = image_spec(config)
    tower = replace(image.tower, prefix=PREFIX + image.tower.prefix)
    image = replace(image, tower=tower, projection=PREFIX + image.projection)
    # The code counts as CLIPSeg does, but over states without those before the first block: each is
    # read one block later.
    read = tuple(layer + 1 for layer in extracted(config, tower.layers - 1))
    return TimmStates(image, read, f"{PREFIX}logit_scale")


def text_spec(config: Mapping[str, Any]) -> BertText:
    """The text part of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = biomedclipseg_config(config)
    bert = bert_spec(config["text_config"], PREFIX + TEXT_PREFIX, "text_config")
    sizes = config["text_projection_size"], config["projection_dim"]
    names = (f"{PREFIX}text.proj.{i}.weight" for i in (0, 2))
    return BertText(bert, (), tuple(zip(names, sizes, strict=True)), logit_scale="")


def mask_spec(config: Mapping[str, Any]) -> MaskDecoder:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = biomedclipseg_config(config)
    states = states_spec(config)
    size = config["projection_dim"]
    return mask_decoder(config, states.image.tower, len(states.read), size, DECODER_EPS)
