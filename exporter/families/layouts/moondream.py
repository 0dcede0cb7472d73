"""Moondream2 as it is published: its config.json says nothing of sizes, its prompt is lists of tokens.

Both stand in the published code; what is here are its values for the hub's revision 2025-01-09
(github.com/vikhyat/moondream at ad09284: moondream/torch/{config,moondream}.py). A folder of another
revision may say its own in config.json, under ``config``, in the keys of the published code's
config files. Where the folder still has that code's config.py, its tokens are read and compared,
and nothing of it is run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.config import count

PUBLISHED_TYPE, MODEL_TYPE = "moondream1", "moondream2"
PUBLISHED_CLASS, CLASS = "HfMoondream", "MoondreamForConditionalGeneration"
REVISION = "2025-01-09"
MAX_CODE = 1 << 20
# Published key to ours and the published default, part by part.
TEXT = {
    "dim": ("hidden_size", 2048),
    "ff_dim": ("intermediate_size", 8192),
    "n_layers": ("num_hidden_layers", 24),
    "vocab_size": ("vocab_size", 51200),
    "max_context": ("max_position_embeddings", 2048),
    "n_heads": ("num_attention_heads", 32),
}
VISION = {
    "enc_dim": ("hidden_size", 1152),
    "enc_patch_size": ("patch_size", 14),
    "enc_n_layers": ("num_hidden_layers", 27),
    "enc_ff_dim": ("intermediate_size", 4304),
    "enc_n_heads": ("num_attention_heads", 16),
    "crop_size": ("image_size", 378),
    "max_crops": ("max_crops", 12),
    "overlap_margin": ("overlap_margin", 4),
    "proj_inner_dim": ("projection_inner_size", 8192),
}
REGION = {
    "coord_feat_dim": ("coordinate_features", 256),
    "coord_out_dim": ("coordinate_bins", 1024),
    "size_feat_dim": ("size_features", 512),
    "size_out_dim": ("size_bins", 2048),
    "inner_dim": ("inner_size", 8192),
}
TOKENS: Mapping[str, Any] = {
    "bos_id": 50256,
    "eos_id": 50256,
    "templates": {
        "caption": {"short": [198, 198, 16438, 8305, 25], "normal": [198, 198, 24334, 1159, 25]},
        "query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]},
        "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
        "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
    },
}
# Names before the code was rewritten as one class, as that class's loader reads them (and as adapters
# trained with the older code have them); * stands for a layer's number.
OLDER_NAMES = (
    ("text_model.transformer.embd.wte.weight", "model.text.wte"),
    ("text_model.transformer.h.*.ln", "model.text.blocks.*.ln"),
    ("text_model.transformer.h.*.mixer.Wqkv", "model.text.blocks.*.attn.qkv"),
    ("text_model.transformer.h.*.mixer.out_proj", "model.text.blocks.*.attn.proj"),
    ("text_model.transformer.h.*.mlp", "model.text.blocks.*.mlp"),
    ("text_model.lm_head.ln", "model.text.post_ln"),
    ("text_model.lm_head.linear", "model.text.lm_head"),
    ("vision_encoder.encoder.model.visual.patch_embed.linear", "model.vision.patch_emb"),
    ("vision_encoder.encoder.model.visual.pos_embed", "model.vision.pos_emb"),
    ("vision_encoder.encoder.model.visual.blocks.*.norm1", "model.vision.blocks.*.ln1"),
    ("vision_encoder.encoder.model.visual.blocks.*.norm2", "model.vision.blocks.*.ln2"),
    ("vision_encoder.encoder.model.visual.blocks.*.attn", "model.vision.blocks.*.attn"),
    ("vision_encoder.encoder.model.visual.blocks.*.mlp", "model.vision.blocks.*.mlp"),
    ("vision_encoder.encoder.model.visual.norm", "model.vision.post_ln"),
    ("vision_encoder.projection.mlp", "model.vision.proj_mlp"),
    ("region_model.coordinate_encoder", "model.region.coord_encoder"),
    ("region_model.coordinate_decoder", "model.region.coord_decoder"),
    ("region_model.size_encoder", "model.region.size_encoder"),
    ("region_model.size_decoder", "model.region.size_decoder"),
)


def moondream_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says everything, of a published one and the defaults of the published code.

    Raises `InputRefused` for the revisions of 2024 (which cut and prompt otherwise), for those whose
    prompt is not known here, and for quantized ones.
    """
    declared = config.get("architectures")
    if declared != [PUBLISHED_CLASS]:
        raise InputRefused(
            f"config.json: architectures is {declared!r}: revisions of Moondream2 from 2024 cut images and "
            f"ask in another way, which is not known here; expected [{PUBLISHED_CLASS!r}], revision "
            f"{REVISION}"
        )
    given = config.get("config") or {}
    parts = {key: given.get(key) or {} for key in ("text", "vision", "region", "tokenizer")}
    if not all(isinstance(part, Mapping) for part in parts.values()):
        raise InputRefused(f"config.json: config is {str(given)[:100]!r}; expected objects in it")
    text, vision = (
        _renamed(parts["text"], TEXT, "text"),
        _renamed(parts["vision"], VISION, "vision"),
    )
    _check_parts(parts, text, vision)
    prompt = prompt_config(parts["tokenizer"])
    dtype = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        # A row of the embedding that no token of the tokenizer has.
        "image_token_id": text["vocab_size"] - 1,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "phi",
            **text,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "bos_token_id": prompt["bos_token_id"],
            "eos_token_id": prompt["eos_token_id"],
            **dtype,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-5,
        },
        "region_config": _renamed(parts["region"], REGION, "region"),
        "prompt_config": prompt,
        **dtype,
    }


def prompt_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """How a question is asked, of a published tokenizer part: lists of tokens around the question.

    Revisions 2025-03-27 and 2025-04-14 (known by their long captions) put a space before it. Raises
    `InputRefused` for later ones, which also forbid a token while answering.
    """
    tokens = {**TOKENS, **given}
    if "answer_id" in given:
        raise InputRefused(
            "config.json or config.py names an answer_id: revisions of Moondream2 from 2025-06 on are not "
            f"known here (another tokenizer, and tokens that are forbidden in answers); expected {REVISION}"
        )
    templates = tokens["templates"]
    query = templates.get("query") if isinstance(templates, Mapping) else None
    if not isinstance(query, Mapping) or not all(
        map(_tokens, (query.get("prefix"), query.get("suffix")))
    ):
        raise InputRefused(
            f"config.json: config.tokenizer.templates.query is {str(query)[:100]!r}; expected token lists "
            "'prefix' and 'suffix'"
        )
    for key in ("bos_id", "eos_id"):
        if type(tokens[key]) is not int or tokens[key] < 0:
            raise InputRefused(f"config.json: config.tokenizer.{key} is {tokens[key]!r}")
    caption = templates.get("caption")
    return {
        "bos_token_id": tokens["bos_id"],
        "eos_token_id": tokens["eos_id"],
        "query_prefix": list(query["prefix"]),
        "query_suffix": list(query["suffix"]),
        "space_before_question": isinstance(caption, Mapping) and "long" in caption,
    }


def check_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the tokens in a folder's config.py with those that its config.json stands for here.

    Nothing when there is no such file. Raises `InputRefused` when they differ, or when it cannot be
    read as what the published code is.
    """
    path = folder / "config.py"
    if not path.is_file():
        return
    if path.stat().st_size > MAX_CODE:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes; expected the published config.py")
    try:
        stated = _defaults(ast.parse(path.read_bytes()), "TokenizerConfig")
    except (SyntaxError, ValueError, RecursionError, StopIteration) as error:
        raise InputRefused(
            f"{path}: no TokenizerConfig with plain values ({type(error).__name__}); remove the file when it "
            f"is not Moondream's, and say in config.json which tokens it has (config.tokenizer)"
        ) from error
    given = (config.get("config") or {}).get("tokenizer") or {}
    if prompt_config({**stated, **given}) != prompt_config(given):
        raise InputRefused(
            f"{path}: its tokens are not those of revision {REVISION} (its start token is "
            f"{stated.get('bos_id')}, its question template {stated.get('templates', {}).get('query')}); write "
            "its TokenizerConfig into config.json as config.tokenizer, or take that revision"
        )


def _defaults(code: ast.Module, name: str) -> dict[str, Any]:
    """The default values in a dataclass of `code`: literals, or a field whose factory gives one."""
    found = next(n for n in code.body if isinstance(n, ast.ClassDef) and n.name == name)
    values: dict[str, Any] = {}
    for entry in found.body:
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and entry.value:
            value: ast.expr = entry.value
            if isinstance(value, ast.Call):
                value = next(k.value for k in value.keywords if k.arg == "default_factory")
                value = value.body if isinstance(value, ast.Lambda) else value
            values[entry.target.id] = ast.literal_eval(value)
    return values


def _renamed(
    given: Mapping[str, Any], keys: Mapping[str, tuple[str, int]], where: str
) -> dict[str, int]:
    return {
        new: count(given, old, default, f"config.{where}") for old, (new, default) in keys.items()
    }


def _check_parts(
    parts: Mapping[str, Mapping[str, Any]], text: Mapping[str, int], vision: Mapping[str, int]
) -> None:
    """What the published settings could say and the graphs cannot do, or what contradicts itself."""
    grid = vision["image_size"] // vision["patch_size"]
    expected = {
        ("text", "n_kv_heads"): text["num_attention_heads"],
        ("text", "prefix_attn"): 1 + grid**2,
        ("text", "group_size"): None,
        ("vision", "proj_out_dim"): text["hidden_size"],
        ("vision", "in_channels"): 3,
        ("region", "dim"): text["hidden_size"],
        ("region", "group_size"): None,
    }
    for (part, key), value in expected.items():
        if parts[part].get(key, value) != value:
            raise InputRefused(
                f"config.json: config.{part}.{key} is {parts[part][key]!r}; expected {value} (quantized "
                "checkpoints are not read)"
            )


def _tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(t) is int and t >= 0 for t in value)
