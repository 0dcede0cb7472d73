"""CLIPSeg (arXiv 2112.10003): a mask for an image and a text."""

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
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.clip import ClipTokens, read_clip_tokens
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.text import clipseg
from exporter.families.specs.clipseg import mask_spec, states_spec, text_spec
from exporter.families.tasks import (
    MASK_GRAPH,
    TEXT_GRAPH,
    VISION_GRAPH,
    GraphSpec,
    Outputs,
    Task,
)

MODEL_TYPES = ("clipseg",)
TASK: Task = "segmentation"
TORCH_CLASSES = {"clipseg": "CLIPSegForImageSegmentation"}
PUBLISHED: Mapping[str, PublishedLayout] = {}
LAYOUTS = (Layout(MODEL_TYPES, (), embedding="clip.text_model.embeddings.token_embedding.weight"),)
SHAPES = {"clipseg": clipseg}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": 512,
    "reduce_dim": 64,
    "decoder_intermediate_size": 2048,
    "decoder_num_attention_heads": 4,
    "conditional_layer": 0,
    "extract_layers": (3, 6, 9),
    "use_complex_transposed_convolution": False,
    "text_config.hidden_size": 512,
    "text_config.intermediate_size": 2048,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 8,
    "text_config.max_position_embeddings": 77,
    "text_config.vocab_size": 49408,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 32,
    "vision_config.layer_norm_eps": 1e-5,
}


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """See `families.tasks.TaskFamily`."""
    return {
        VISION_GRAPH: states_spec(config),
        TEXT_GRAPH: text_spec(config),
        MASK_GRAPH: mask_spec(config),
    }


@dataclass(frozen=True)
class ClipSegPreparer:
    """`families.tasks.SegmentationPreparer` for one model folder."""

    settings: ClipImageSettings
    tokens: ClipTokens

    def images(self, images: Sequence[Image]) -> Feed:
        """``pixel_values`` float32 ``[images, 3, side, side]``: resized without keeping their shape."""
        return clip_feed(images, self.settings)

    def texts(self, texts: Sequence[str]) -> Feed:
        """``input_ids`` and ``attention_mask`` int64 ``[texts, length]``, padded to the longest; longer
        texts than the model has positions for are cut before their end token.
        """
        return self.tokens.encode(texts)


def open_preparer(model_dir: Path) -> ClipSegPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    patch = states_spec(config).tower.patch_size
    raw, where = read_image_settings(model_dir)
    settings = read_vit_settings(raw, where)
    size = settings.output()
    if size is None or size[0] != size[1] or size[0] % patch:
        raise InputRefused(
            f"{where}: images become {size or 'of any size'}; the mask decoder takes squares of whole "
            f"patches of {patch} pixels"
        )
    return ClipSegPreparer(settings, read_clip_tokens(model_dir, text_spec(config)))


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """See `families.tasks.TaskFamily`, of a CLIPSegForImageSegmentation."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in feed.items()}
    layers = model.config.extract_layers
    if graph == VISION_GRAPH:
        states = model.clip.vision_model(**given, output_hidden_states=True).hidden_states
        # The states before the first block count too.
        return {f"activations.{i}": states[layer + 1].numpy() for i, layer in enumerate(layers)}
    if graph == TEXT_GRAPH:
        embeds = model.get_conditional_embeddings(len(given["input_ids"]), **given)
        return {"text_embeds": embeds.numpy()}
    texts = given["text_embeds"]
    # The library has an image for each text.
    states = [given[f"activations.{i}"].expand(len(texts), -1, -1) for i in range(len(layers))]
    return {"logits": model.decoder(states, texts).logits.numpy()}
