"""Names: which layouts of tensor names there were, and what an adapter's keys mean.

transformers moved the parts of its vision-language models twice (4.52 and 5.0), and peft writes the
names of the version it ran under. All layouts of an architecture are brought to one, the newest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exporter.core.errors import InputRefused
from exporter.families.bert_published import BARE_NAMES
from exporter.families.published import PUBLISHED, swap_stem

PEFT_PREFIX = "base_model.model."

Part = Literal[
    "lora_A",
    "lora_B",
    "lora_B_bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base",
    "whole",
]


@dataclass(frozen=True)
class Layout:
    """Names of one architecture in transformers 5.

    `renames`: (older, newest) leading path elements, applied in order; what they give is left alone
    by them. `head`: empty where no matrix is the embedding's counterpart. `conv1d`: last path elements
    of modules that store their weight transposed. `text_type`: the text part's model_type where names
    depend on it.
    """

    model_types: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    embedding: str
    head: str = ""
    conv1d: tuple[str, ...] = ()
    text_type: str = ""

    def canonical(self, name: str) -> str:
        """`name` (a tensor or module of any layout) as transformers 5 calls it."""
        for old, new in self.renames:
            found = swap_stem(name, old, new)
            name = name if found is None else found
        return name


VIT = "encoder.layers.*"
LAYOUTS = (
    Layout(
        ("idefics3", "smolvlm"),
        # The same in all versions; the short forms are adapters of the model without its head.
        (
            ("text_model", "model.text_model"),
            ("vision_model", "model.vision_model"),
            ("connector", "model.connector"),
        ),
        embedding="model.text_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("llava", "llava_next"),
        (
            ("language_model.lm_head", "lm_head"),  # <= 4.51
            ("language_model.model", "model.language_model"),  # <= 4.51
            ("language_model", "model.language_model"),
            ("vision_tower", "model.vision_tower"),  # <= 4.51
            ("multi_modal_projector", "model.multi_modal_projector"),  # <= 4.51
            ("image_newline", "model.image_newline"),  # <= 4.51
            ("model.vision_tower.vision_model", "model.vision_tower"),  # <= 4.57
        ),
        embedding="model.language_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("llava_mistral",),
        PUBLISHED["llava_mistral"].names.pairs,
        embedding="model.language_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("qwen2_vl", "qwen2_5_vl"),
        (
            ("model.layers", "model.language_model.layers"),  # <= 4.51
            ("model.embed_tokens", "model.language_model.embed_tokens"),  # <= 4.51
            ("model.norm", "model.language_model.norm"),  # <= 4.51
            ("visual", "model.visual"),  # <= 4.51
            ("language_model", "model.language_model"),
        ),
        embedding="model.language_model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("moondream1", "moondream2"),
        (
            *PUBLISHED["moondream1"].names.pairs,
            ("text", "model.text"),  # adapters of the published inner class
            ("vision", "model.vision"),
            ("region", "model.region"),
        ),
        embedding="model.text.wte",
        head="model.text.lm_head.weight",
    ),
    Layout(
        ("vision-encoder-decoder",),
        (  # <= 4.57
            ("encoder.encoder.layer", "encoder.layers"),
            (f"{VIT}.attention.attention.query", f"{VIT}.attention.q_proj"),
            (f"{VIT}.attention.attention.key", f"{VIT}.attention.k_proj"),
            (f"{VIT}.attention.attention.value", f"{VIT}.attention.v_proj"),
            (f"{VIT}.attention.output.dense", f"{VIT}.attention.o_proj"),
            (f"{VIT}.intermediate.dense", f"{VIT}.mlp.fc1"),
            (f"{VIT}.output.dense", f"{VIT}.mlp.fc2"),
        ),
        embedding="decoder.transformer.wte.weight",
        head="decoder.lm_head.weight",
        conv1d=("c_attn", "c_proj", "c_fc", "q_attn"),
    ),
    Layout(
        ("idefics",),
        # The same in all versions; the short forms are adapters of the model without its head.
        (
            ("layers", "model.layers"),
            ("gated_cross_attn_layers", "model.gated_cross_attn_layers"),
            ("perceiver_resampler", "model.perceiver_resampler"),
            ("vision_model", "model.vision_model"),
            ("embed_tokens", "model.embed_tokens"),
        ),
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("blip-2",),
        (),
        embedding="language_model.model.decoder.embed_tokens.weight",
        head="language_model.lm_head.weight",
        text_type="opt",
    ),
    Layout(
        ("blip-2", "mini_gpt4"),
        PUBLISHED["mini_gpt4"].names.pairs,
        embedding="language_model.model.embed_tokens.weight",
        head="language_model.lm_head.weight",
    ),
    Layout(
        ("cnn_transformer",),
        (),
        embedding="embed_tokens.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("clip", "medbridge"),
        (),
        embedding="text_model.embeddings.token_embedding.weight",
    ),
    Layout(
        ("chexzero",),
        PUBLISHED["chexzero"].names.pairs,
        embedding="text_model.embeddings.token_embedding.weight",
    ),
    Layout(
        ("biomedclipseg",),
        PUBLISHED["biomedclipseg"].names.pairs,
        embedding="biomedclip.text.transformer.embeddings.word_embeddings.weight",
    ),
    Layout(
        ("cris",),
        PUBLISHED["cris"].names.pairs,
        embedding="backbone.token_embedding.weight",
    ),
    Layout(
        ("clipseg",),
        (),
        embedding="clip.text_model.embeddings.token_embedding.weight",
    ),
    Layout(
        ("bert",),
        (*BARE_NAMES["bert"], *PUBLISHED["bert"].names.pairs),
        embedding="bert.embeddings.word_embeddings.weight",
    ),
    Layout(
        ("distilbert",),
        (*BARE_NAMES["distilbert"], *PUBLISHED["distilbert"].names.pairs),
        embedding="distilbert.embeddings.word_embeddings.weight",
    ),
    # open_clip's names in all versions.
    Layout(
        ("biomedclip",),
        (),
        embedding="text.transformer.embeddings.word_embeddings.weight",
    ),
    Layout(
        ("medclip",),
        PUBLISHED["medclip"].names.pairs,
        embedding="text_model.model.embeddings.word_embeddings.weight",
    ),
    Layout(
        ("medfilip",),
        (),
        embedding="text_model.embeddings.token_embedding.weight",
    ),
    Layout(
        ("t5",),
        (),
        embedding="shared.weight",
        head="lm_head.weight",
    ),
    Layout(
        ("gpt2",),
        (
            ("h", "transformer.h"),
            ("wte", "transformer.wte"),
            ("wpe", "transformer.wpe"),
            ("ln_f", "transformer.ln_f"),
        ),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        conv1d=("c_attn", "c_proj", "c_fc", "q_attn"),
    ),
)


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The row for a parsed config.json. Raises `InputRefused` for an unknown model_type."""
    kind, text = config.get("model_type"), config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    for layout in LAYOUTS:
        if kind in layout.model_types and layout.text_type in ("", text_type):
            return layout
    known = sorted(kind for layout in LAYOUTS for kind in layout.model_types)
    raise InputRefused(
        f"config.json: model_type {kind!r} has no table of tensor names; known: {', '.join(known)}"
    )


@dataclass(frozen=True)
class AdapterKey:
    """One adapter tensor: the module it belongs to (newest layout) and its part in it.

    For `whole` (a tensor that replaces one of the base) and `base` (peft's copy of a base weight)
    `module` is the tensor's whole name.
    """

    key: str
    module: str
    part: Part
    adapter: str | None


FORMS: tuple[tuple[re.Pattern[str], Part | None], ...] = (
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_[AB])(\.(?P<a>[^.]+))?\.weight"), None),
    (re.compile(r"(?P<m>.+)\.lora_B(\.(?P<a>[^.]+))?\.bias"), "lora_B_bias"),
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_embedding_[AB])(\.(?P<a>[^.]+))?"), None),
    (re.compile(r"(?P<m>.+)\.(?P<p>lora_magnitude_vector)(\.(?P<a>[^.]+?))??(\.weight)?"), None),
    (re.compile(r"(?P<m>.+)\.base_layer\.weight"), "base"),
    (re.compile(r"(?P<m>.+)\.base_layer\.bias"), "whole"),
    (re.compile(r"(?P<m>.+)\.modules_to_save(\.(?P<a>[^.]+))?\.(?P<t>weight|bias)"), "whole"),
    (re.compile(r"(?P<m>.+)"), "whole"),
)


def parse_key(key: str, layout: Layout) -> AdapterKey:
    """Take one key of adapter_model.safetensors apart (with or without prefix and adapter name)."""
    name = key.removeprefix(PEFT_PREFIX)
    for form, part in FORMS:
        if found := form.fullmatch(name):
            groups = found.groupdict()
            module = groups["m"]
            if part == "base":
                module += ".weight"
            elif "base_layer" in form.pattern:
                module += ".bias"
            elif groups.get("t"):
                module += f".{groups['t']}"
            return AdapterKey(
                key, layout.canonical(module), part or _part(groups["p"]), groups.get("a")
            )
    raise InputRefused(f"adapter key {key!r} is empty; expected a module's name")


def _part(text: str) -> Part:
    parts: dict[str, Part] = {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    return parts[text]
