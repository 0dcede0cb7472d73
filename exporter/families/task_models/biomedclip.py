"""BiomedCLIP (arXiv 2303.00915): timm's ViT and BiomedBERT in one space, published by open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed, VitSpec
from exporter.families.config import choice, count, positive
from exporter.families.images.open_clip import read_open_clip_images
from exporter.families.layouts.biomedclip import (
    IMAGES,
    LEFT_OUT,
    MODEL_TYPE,
    TEXT_PREFIX,
    biomedclip_config,
    check_open_clip,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.bert import read_matched_texts
from exporter.families.prompts.matching import BertMatchingPreparer
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.text import open_clip
from exporter.families.specs.bert_towers import BERT_DEFAULTS, BertText
from exporter.families.specs.timm_vit import NAMES, TimmImage
from exporter.families.task_models.bert import bert_spec
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: "exporter.families.reference.biomedclip:BiomedCLIPModel"}
# Names are open_clip's.
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        biomedclip_config,
        NameMap(()),
        "take that of microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        {"preprocessor_config.json": IMAGES},
        check=check_open_clip,
        left_out=lambda _: LEFT_OUT,
    )
}
LAYOUTS = (Layout(MODEL_TYPES, (), embedding="text.transformer.embeddings.word_embeddings.weight"),)
SHAPES = {MODEL_TYPE: open_clip}
# Of the models that the published config names.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": 512,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 16,
    "vision_config.layer_norm_eps": 1e-6,
    **BERT_DEFAULTS,
    "text_config.vocab_size": 30522,
    "text_config.context_length": 256,
}
# What the authors' example puts around a label.
TEMPLATE = "this is a photo of {}"
ACTIVATIONS = ("gelu",)
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("patch_size", "image_size"),
)


def image_spec(config: Mapping[str, Any]) -> TimmImage:
    """The image half of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = biomedclip_config(config)
    vision, where = config["vision_config"], "vision_config"
    sizes = {key: count(vision, key, 0, where) for key in SIZES}
    tower = VitSpec(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        patch_size=sizes["patch_size"],
        image_size=sizes["image_size"],
        norm_eps=positive(vision, "layer_norm_eps", 1e-6, where),
        activation=choice(vision, "hidden_act", "gelu", ACTIVATIONS, where),
        prefix="visual.trunk.",
        names=NAMES,
    )
    if tower.hidden_size % tower.heads or tower.image_size % tower.patch_size:
        raise InputRefused(
            f"config.json: {where} has hidden size {tower.hidden_size}, {tower.heads} heads and patches of "
            f"{tower.patch_size} in {tower.image_size} pixels; expected multiples"
        )
    return TimmImage(tower, "visual.head.proj.weight", config["projection_dim"])


def text_spec(config: Mapping[str, Any]) -> BertText:
    """The text half of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = biomedclip_config(config)
    bert = bert_spec(config["text_config"], TEXT_PREFIX, "text_config")
    inner, size = config["text_projection_size"], config["projection_dim"]
    return BertText(bert, (), (("text.proj.0.weight", inner), ("text.proj.2.weight", size)))


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: image_spec(config), TEXT_GRAPH: text_spec(config)}


def open_preparer(model_dir: Path) -> BertMatchingPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = biomedclip_config(read_config(model_dir / "config.json"))
    bert = text_spec(config).bert
    tokens = read_matched_texts(model_dir, config["text_config"], bert)
    side = image_spec(config).tower.image_size
    images = read_open_clip_images(*read_image_settings(model_dir), side)
    return BertMatchingPreparer(TEMPLATE, images.pixels, tokens)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds, or text_embeds and logit_scale, of the family's own class."""
    import torch

    arguments = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        return {"image_embeds": model.encode_image(**arguments).numpy()}
    return {
        "text_embeds": model.encode_text(**arguments).numpy(),
        "logit_scale": model.logit_scale.detach().exp().numpy(),
    }
