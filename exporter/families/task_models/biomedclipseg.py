"""BiomedCLIPSeg (arXiv 2308.07706): a mask for a medical image and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.images.clip import ClipImageSettings, clip_feed
from exporter.families.images.vit import read_vit_settings
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.bert import BertTexts, read_matched_texts
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.text import biomedclipseg
from exporter.families.specs.biomedclipseg import (
    CLASS,
    IMAGES,
    MODEL_TYPE,
    PUBLISHED_NAMES,
    biomedclipseg_config,
    mask_spec,
    states_spec,
    text_spec,
)
from exporter.families.tasks import (
    MASK_GRAPH,
    TEXT_GRAPH,
    VISION_GRAPH,
    GraphSpec,
    Outputs,
    Task,
)

MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "segmentation"
TORCH_CLASSES = {MODEL_TYPE: f"exporter.families.reference.biomedclipseg:{CLASS}"}
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        biomedclipseg_config,
        NameMap(PUBLISHED_NAMES),
        "take that of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        {"preprocessor_config.json": IMAGES},
    )
}
LAYOUTS = (
    Layout(
        MODEL_TYPES,
        PUBLISHED_NAMES,
        embedding="biomedclip.text.transformer.embeddings.word_embeddings.weight",
    ),
)
SHAPES = {MODEL_TYPE: biomedclipseg}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": 512,
    "reduce_dim": 64,
    "decoder_intermediate_size": 2048,
    "decoder_num_attention_heads": 4,
    "conditional_layer": 0,
    "extract_layers": (3, 6, 9),
    "use_complex_transposed_convolution": True,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 16,
    "text_config.hidden_size": 768,
    "text_config.intermediate_size": 3072,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 12,
    "text_config.vocab_size": 30522,
    "text_config.max_position_embeddings": 512,
    "text_config.type_vocab_size": 2,
    "text_config.context_length": 256,
}


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """See `families.tasks.TaskFamily`."""
    return {
        VISION_GRAPH: states_spec(config),
        TEXT_GRAPH: text_spec(config),
        MASK_GRAPH: mask_spec(config),
    }


@dataclass(frozen=True)
class BiomedSegPreparer:
    """`families.tasks.SegmentationPreparer` for one model folder."""

    settings: ClipImageSettings
    tokens: BertTexts

    def images(self, images: Sequence[Image]) -> Feed:
        """``pixel_values`` float32 ``[images, 3, side, side]``: resized without keeping their shape."""
        return clip_feed(images, self.settings)

    def texts(self, texts: Sequence[str]) -> Feed:
        """``input_ids`` and ``attention_mask`` int64 ``[texts, length]``, padded to the longest; longer
        texts than the model was trained with are cut.
        """
        return self.tokens.texts(texts)


def open_preparer(model_dir: Path) -> BiomedSegPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = biomedclipseg_config(read_config(model_dir / "config.json"))
    settings = read_vit_settings(*read_image_settings(model_dir))
    side = states_spec(config).image.tower.image_size
    if settings.output() != (side, side):
        raise InputRefused(
            f"{model_dir / 'preprocessor_config.json'}: images become {settings.output()} pixels (height, "
            f"width), config.json's tower takes squares of {side}"
        )
    bert = text_spec(config).bert
    tokens = read_matched_texts(model_dir, config["text_config"], bert)
    return BiomedSegPreparer(settings, tokens)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """See `families.tasks.TaskFamily`, of the family's own class."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        states = model.states(**given)
        return {f"activations.{i}": part.numpy() for i, part in enumerate(states)}
    if graph == TEXT_GRAPH:
        return {"text_embeds": model.biomedclip.encode_text(**given).numpy()}
    texts = given["text_embeds"]
    count_ = len(model.config.extract_layers)
    states = [given[f"activations.{i}"].expand(len(texts), -1, -1) for i in range(count_)]
    return {"logits": model.decoder(states, texts).logits.numpy()}
