"""Chinese-CLIP (arXiv 2211.01335): CLIP's image tower and a Chinese BERT in one space.

Names and config are transformers' ChineseCLIPModel's. The text half is a BERT without pooler, whose
first token's last state is projected; transformers' class gives it the token type 0, and so does the
graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.catalog.schema import Value
from exporter.core.modelfiles import read_config
from exporter.families.config import count
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import SAVE_TOKENIZER, PublishedLayout
from exporter.families.prompts.bert import read_bert_texts
from exporter.families.prompts.matching import BertMatchingPreparer
from exporter.families.prompts.textfiles import read_optional
from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import ModelShape, linear, other
from exporter.families.shapes.text import bert_text
from exporter.families.shapes.text import clip as clip_shape
from exporter.families.specs.bert_towers import BERT_DEFAULTS, BertText
from exporter.families.specs.clip import PROJECTION_SIZE, clip_image, clip_section
from exporter.families.task_models import clip
from exporter.families.task_models.bert import bert_spec
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Task

MODEL_TYPE = "chinese_clip"
MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: "ChineseCLIPModel"}
LAYOUTS = (Layout(MODEL_TYPES, (), "text_model.embeddings.word_embeddings.weight"),)
# Tokens that all models of the authors were trained with (cn_clip/clip/utils.py).
CONTEXT = 52
# What the config class puts where config.json has no key; the context is for plans.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    **clip.CONFIG_DEFAULTS,
    **BERT_DEFAULTS,
    "text_config.model_type": "chinese_clip_text_model",
    "text_config.vocab_size": 30522,
    "text_config.context_length": CONTEXT,
}
# The first of the authors' templates (cn_clip/eval/cvinw_zeroshot_templates.py): "a photo of {}".
TEMPLATE = "{}的照片"
# The image processor computes what CLIP's does, so either's settings will do.
PROCESSORS = (
    *clip.PROCESSORS,
    *(f"ChineseCLIPImageProcessor{kind}" for kind in ("", "Fast", "Pil")),
    "ChineseCLIPFeatureExtractor",
)
# get_image_features, get_text_features and logit_scale are called as CLIPModel's.
torch_outputs = clip.torch_outputs


def newest_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without a pad_token_id in its text part: where there is one, transformers 5 sets that
    token's row to zero whenever it loads a ChineseCLIPModel, and the weights are not those stored.

    Nothing else reads it; padding is masked. Raises `InputRefused`.
    """
    text = {**clip_section(config, "text_config"), "pad_token_id": None}
    return {**{k: v for k, v in config.items() if k != "text_config_dict"}, "text_config": text}


def shape(facts: ConfigFacts) -> ModelShape:
    """Sizes for plans: CLIP's tower and projection, BERT without pooler and its own, one scale."""
    matcher = clip_shape(facts)
    text, words = bert_text(facts, "text_config.", pooler=False)
    weights = (
        *(w for w in matcher.weights if w.part == "vision"),
        *words,
        *linear("text", facts.size("projection_dim"), text.hidden),
        *other("text", 1),
    )
    return ModelShape("matcher", weights, matcher.tower, text)


# Names are transformers'; the repositories have a vocab.txt alone.
PUBLISHED = {MODEL_TYPE: PublishedLayout(newest_config, NameMap(()), SAVE_TOKENIZER)}
SHAPES = {MODEL_TYPE: shape}


def text_spec(config: Mapping[str, Any]) -> BertText:
    """The text half of a parsed config.json. Raises `InputRefused` on a bad one."""
    bert = bert_spec(clip_section(config, "text_config"), "text_model.", "text_config")
    size = count(config, "projection_dim", PROJECTION_SIZE, "config")
    return BertText(bert, (), (("text_projection.weight", size),))


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: clip_image(config), TEXT_GRAPH: text_spec(config)}


def open_preparer(model_dir: Path) -> BertMatchingPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    bert, side = text_spec(config).bert, clip_image(config).tower.image_size
    limit = context_length(model_dir, bert.max_positions)
    tokens = read_bert_texts(model_dir, bert.vocab_size, limit, types=False)
    return BertMatchingPreparer(TEMPLATE, clip.read_pixels(model_dir, side, PROCESSORS), tokens)


def context_length(folder: Path, positions: int) -> int:
    """Tokens at which texts are cut: the tokenizer's own limit where it names one that the model has
    `positions` for (as a model trained on long reports does), else the authors' 52.
    """
    named = read_optional(folder / "tokenizer_config.json").get("model_max_length")
    # Without a limit transformers writes an int of 31 digits.
    own = named if type(named) is int and named <= positions else CONTEXT
    return min(own, positions)
