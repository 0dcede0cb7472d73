"""MedCLIP (arXiv 2210.10163): a Swin tower or ResNet-50, and BioClinicalBERT, in one space.

A text's vector is the mean of three hidden states over all its places. Padding counts among them in the
published code, so texts that are prepared together move one another a little; one text alone has no
padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed, TensorSpec
from exporter.families.config import count
from exporter.families.images.medclip import read_medclip_images
from exporter.families.layouts.medclip import (
    IMAGES,
    LEFT_OUT,
    MODEL_TYPE,
    OLD_NAMES,
    RESNET,
    TEXT_PREFIX,
    VISION_PREFIX,
    medclip_config,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.bert import read_matched_texts
from exporter.families.prompts.matching import BertMatchingPreparer
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.swin import medclip
from exporter.families.specs.bert_towers import BERT_DEFAULTS, BertText
from exporter.families.specs.examples import example_images
from exporter.families.specs.resnet import ResNetImage, resnet_image
from exporter.families.specs.swin import SwinSpec, swin_spec
from exporter.families.task_models.bert import bert_spec
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: "exporter.families.reference.medclip:MedCLIPModel"}
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        medclip_config,
        NameMap(OLD_NAMES),
        "take that of emilyalsentzer/Bio_ClinicalBERT, saved by transformers' AutoTokenizer",
        {"preprocessor_config.json": IMAGES},
        left_out=lambda _: LEFT_OUT,
    )
}
LAYOUTS = (
    Layout(MODEL_TYPES, OLD_NAMES, embedding="text_model.model.embeddings.word_embeddings.weight"),
)
SHAPES = {MODEL_TYPE: medclip}
# Of the models that the published code names, with the Swin tower.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": 512,
    "vision_config.model_type": "swin",
    "vision_config.image_size": 224,
    "vision_config.patch_size": 4,
    "vision_config.embed_dim": 96,
    # Each tower has its own.
    "vision_config.depths": None,
    "vision_config.num_heads": (3, 6, 12, 24),
    "vision_config.window_size": 7,
    "vision_config.mlp_ratio": 4.0,
    "vision_config.layer_norm_eps": 1e-5,
    **BERT_DEFAULTS,
    "text_config.vocab_size": 28996,
    "text_config.context_length": 77,
}
# The authors describe each class in sentences of their own, with nothing around them.
TEMPLATE = "{}"
PROJECTION_SIZE, SIDE = 512, 224
# compute_logits keeps the temperature's logarithm between these.
SCALE_LIMITS = (0.0, 4.6052)


@dataclass(frozen=True)
class SwinImage:
    """A Swin tower, whose mean cell is projected by a matrix without bias (a whole tensor name)."""

    tower: SwinSpec
    projection: str
    output_size: int

    @property
    def image_size(self) -> int:
        """Edge of an image in pixels."""
        return self.tower.image_size

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projection."""
        yield from self.tower.tensors()
        yield TensorSpec(self.projection, (self.output_size, self.tower.output_size), "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.image_size, rng)


def image_spec(config: Mapping[str, Any]) -> SwinImage | ResNetImage:
    """The image half of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = medclip_config(config)
    vision, size = config["vision_config"], projection_size(config)
    if vision["model_type"] == RESNET:
        # The published module has the projection in the place of its last layer.
        return resnet_image(vision, VISION_PREFIX, output_size=size, bias=False, image_size=SIDE)
    tower = swin_spec(vision, VISION_PREFIX, "vision_config")
    return SwinImage(tower, "vision_model.projection_head.weight", size)


def text_spec(config: Mapping[str, Any]) -> BertText:
    """The text half of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = medclip_config(config)
    bert = bert_spec(config["text_config"], TEXT_PREFIX, "text_config")
    if bert.layers < 2:
        raise InputRefused(
            "config.json: text_config has 1 block; expected two or more (MedCLIP's pooling)"
        )
    projection = ("text_model.projection_head.weight", projection_size(config))
    return BertText(bert, (1, 2, bert.layers), (projection,), scale_limits=SCALE_LIMITS)


def projection_size(config: Mapping[str, Any]) -> int:
    """Width of the common space. Raises `InputRefused`."""
    return count(config, "projection_dim", PROJECTION_SIZE, "config")


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: image_spec(config), TEXT_GRAPH: text_spec(config)}


def open_preparer(model_dir: Path) -> BertMatchingPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = medclip_config(read_config(model_dir / "config.json"))
    bert = text_spec(config).bert
    tokens = read_matched_texts(model_dir, config["text_config"], bert)
    side = image_spec(config).image_size
    images = read_medclip_images(*read_image_settings(model_dir), side)
    return BertMatchingPreparer(TEMPLATE, images.pixels, tokens)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds, or text_embeds and logit_scale, of the family's own class."""
    import torch

    arguments = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        return {"image_embeds": model.encode_image(**arguments).numpy()}
    return {
        "text_embeds": model.encode_text(**arguments).numpy(),
        "logit_scale": model.temperature().numpy(),
    }
