"""A tiny random Gemma 3 model folder, laid out as google/gemma-3-4b-it and MedGemma 4B are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

SIDE, PATCH, POOL = 32, 4, 2
ROWS = (SIDE // PATCH // POOL) ** 2
# Smaller than an image: the window cuts what its tokens see of one another.
WINDOW = 8
CONTEXT = 512
BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
BEGIN, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
SPECIAL = (PAD, EOS, BOS, UNK, "<start_of_turn>", "<end_of_turn>", BEGIN, END, SOFT)
SOFT_ID = SPECIAL.index(SOFT)
# The steps of Gemma 3's published template.
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
# Newest stem to the published one.
PUBLISHED = (
    ("model.language_model", "language_model.model"),
    ("model.vision_tower", "vision_tower.vision_model"),
    ("model.multi_modal_projector", "multi_modal_projector"),
)


def write_tiny_gemma3(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float16",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random model in the published layout and names, its tokenizer and its settings.

    Seven layers, of which the sixth sees everything; `text`, `vision` and `top` change keys of
    config.json. Weights are about four times as large as usual, so that greedy text varies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    config = _config(ids, text or {}, vision or {}, top)
    _save(folder, random_tensors(config, seed, dtype))
    _dump(folder / "config.json", config)
    _write_settings(folder, ids, config["mm_tokens_per_image"])
    return folder


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Train a tokenizer of Gemma's kind: spaces as U+2581, bytes as a last resort, <bos> in front."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    spaces = normalizers.Replace(" ", "▁")
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    trained = Tokenizer(models.BPE(unk_token=UNK))
    trained.normalizer, trained.pre_tokenizer = spaces, split
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False, special_tokens=[*SPECIAL])
    trained.train_from_iterator((*SENTENCES, "\n\n\n user model"), trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = spaces, split
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids: dict[str, int] = tokenizer.get_vocab()
    return ids


def random_tensors(config: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    """Weights by the newest names; those of norms are the difference from one."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(**settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = (0.05 if name.endswith("bias") else 0.08) * noise
        if "norm" in name and name.endswith("weight"):
            # SigLIP's layer norms are the usual ones.
            value = 0.1 * noise + (1 if "vision_tower" in name else 0)
        tensors[name] = value.to(getattr(torch, dtype))
    return tensors


def _config(
    ids: dict[str, int], text: dict[str, Any], vision: dict[str, Any], top: dict[str, Any]
) -> dict[str, Any]:
    """The keys that the published config.json has."""
    sizes = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "vocab_size": -(-len(ids) // 64) * 64,
        "max_position_embeddings": CONTEXT,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": WINDOW,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": ids[BEGIN],
        "eoi_token_index": ids[END],
        "image_token_index": ids[SOFT],
        "mm_tokens_per_image": ROWS,
        "eos_token_id": [ids[EOS], ids["<end_of_turn>"]],
        "torch_dtype": "float16",
        "text_config": {**sizes, **text},
        "vision_config": {**tower, **vision},
        **top,
    }


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    def renamed(name: str) -> str:
        for new, old in PUBLISHED:
            if name.startswith(f"{new}."):
                return old + name[len(new) :]
        return name

    stored = {renamed(name): value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _write_settings(folder: Path, ids: dict[str, int], rows: int) -> None:
    _dump(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": rows,
            "image_std": [0.5, 0.5, 0.5],
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": SIDE, "width": SIDE},
        },
    )
    processor = {"image_seq_length": rows, "processor_class": "Gemma3Processor"}
    _dump(folder / "processor_config.json", processor)
    _dump(folder / "chat_template.json", {"chat_template": TEMPLATE})
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "boi_token": BEGIN,
            "eoi_token": END,
            "image_token": SOFT,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"boi_token": BEGIN, "eoi_token": END, "image_token": SOFT},
            "model_max_length": CONTEXT,
        },
    )
    stops = {"eos_token_id": [ids[EOS], ids["<end_of_turn>"]]}
    special = {"bos_token_id": ids[BOS], "pad_token_id": ids[PAD]}
    _dump(folder / "generation_config.json", {**special, **stops})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
