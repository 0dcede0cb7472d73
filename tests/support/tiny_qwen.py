"""A tiny random Qwen2-VL or Qwen2.5-VL model folder, laid out as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

PATCH, MERGE, WINDOW = 4, 2, 2
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
WORDS = 320
IMAGE_ID = WORDS + SPECIAL.index("<|image_pad|>")
# The constructs of the published template: a namespace, tests for keys, a flag that nobody sets.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


def write_tiny_qwen(
    folder: Path,
    kind: str = "qwen2_vl",
    *,
    seed: int = 0,
    old: bool = True,
    tied: bool = True,
    dtype: str = "float16",
) -> Path:
    """Write a random model of the model_type `kind`, its tokenizer and settings, and return `folder`.

    `old`: tensor names and a flat config.json as published; else those of transformers 5. Patches of
    4 pixels, feature rows of 2 x 2 patches, and (Qwen2.5-VL) windows of 2 x 2 feature rows. Weights
    are about four times as large as usual, so that greedy text varies.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    config = _config(kind, vocabulary, tied)
    model_class = getattr(transformers, CLASSES[kind])
    torch.manual_seed(seed)
    model = model_class(model_class.config_class.from_dict(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".ln_q." in name:
                parameter.copy_(float(name.endswith("weight")) + 0.1 * noise)
            else:
                parameter.copy_((0.2 if name.endswith("bias") else 0.16) * noise)
    tensors = {
        (_old_name(n) if old else n): p.detach().to(getattr(torch, dtype)).contiguous()
        for n, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if not old:
        config = {
            **json.loads(model.config.to_json_string(use_diff=False)),
            "architectures": [CLASSES[kind]],
        }
    _dump(folder / "config.json", config)
    _write_settings(folder, vocabulary, old)
    return folder


def _old_name(name: str) -> str:
    """The name up to transformers 4.51, as the published files have it."""
    name = name.replace("model.language_model.", "model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def _config(kind: str, vocabulary: dict[str, int], tied: bool) -> dict[str, Any]:
    vision = {
        "depth": 3,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "spatial_patch_size": PATCH,
        "temporal_patch_size": 2,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    else:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 50,
            "out_hidden_size": 64,
            "hidden_act": "silu",
            "window_size": WINDOW * MERGE * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 1024,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": tied,
        "vocab_size": len(vocabulary) + 3,
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|im_end|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_config": vision,
    }


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """Train a byte-level BPE tokenizer with Qwen2's special tokens; returns the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=WORDS, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == WORDS
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "chat_template": TEMPLATE,
            "model_max_length": 1024,
        },
    )
    found: dict[str, int] = tokenizer.get_vocab()
    return found


def _write_settings(folder: Path, vocabulary: dict[str, int], old: bool) -> None:
    areas = (8 * 8, 96 * 96)
    _dump(
        folder / "preprocessor_config.json",
        {
            **(
                {"min_pixels": areas[0], "max_pixels": areas[1]}
                if old
                else {"size": {"shortest_edge": areas[0], "longest_edge": areas[1]}}
            ),
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    stops = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    settings = {"eos_token_id": stops, "pad_token_id": vocabulary["<|endoftext|>"]}
    _dump(folder / "generation_config.json", settings)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
