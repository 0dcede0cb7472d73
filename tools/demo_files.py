"""The demo model's folder without weights: tokenizer, settings and configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TILE, PATCH, SHUFFLE = 64, 8, 4
TOKENS = (TILE // PATCH // SHUFFLE) ** 2
CONTEXT = 512
PROMPT = "Describe the image."
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAST_TOKENS = (
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)


def write_model_files(folder: Path, captions: Iterable[str], vocabulary: int) -> dict[str, Any]:
    """Train the tokenizer and write every file but the weights; returns the config as a mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder, captions, vocabulary)
    config = _config(ids)
    stop, pad = ids["<end_of_utterance>"], ids["<|im_end|>"]
    _dump(folder / "config.json", config)
    _dump(
        folder / "generation_config.json",
        {"bos_token_id": ids["<|im_start|>"], "eos_token_id": stop, "pad_token_id": pad},
    )
    _dump(folder / "preprocessor_config.json", _preprocessor())
    _dump(
        folder / "processor_config.json",
        {"image_seq_len": TOKENS, "processor_class": "Idefics3Processor"},
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return config


def _write_tokenizer(folder: Path, captions: Iterable[str], size: int) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(LAST_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(FIRST_TOKENS),
    )
    tokenizer.train_from_iterator([*captions, f"User: {PROMPT}\nAssistant:\n\n"], trainer)
    tokenizer.add_special_tokens(list(LAST_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    extra = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    _dump(
        folder / "tokenizer_config.json",
        {
            **named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": extra,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        },
    )
    _dump(folder / "special_tokens_map.json", {**named, "additional_special_tokens": extra})
    return dict(tokenizer.get_vocab())


def _config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "dtype": "float16",
        "image_token_id": ids["<image>"],
        "pad_token_id": ids["<|im_end|>"],
        "scale_factor": SHUFFLE,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(ids),
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<end_of_utterance>"],
            "pad_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": TILE,
            "patch_size": PATCH,
            "layer_norm_eps": 1e-6,
        },
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": TILE},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 2 * TILE},
    }


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
