"""A tiny random Idefics3 model folder, laid out as the published SmolVLM folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PATCH, SHUFFLE = 8, 2
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SENTENCES = (
    "Describe this medical image.",
    "User: Assistant: Write a caption for the image.",
    "Chest X-ray, frontal view, with a moderate left pleural effusion and no pneumothorax.",
    "Axial CT of the abdomen shows a 19 mm lesion in the right lobe of the liver.",
    "Ultrasound of the gallbladder: no stones. MRI of the brain, T2, normal.",
    "Ein Befund mit Umlauten: äöüß; und Zahlen 0123456789.\n\n",
)


def write_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_hidden: int = 64,
    tile: int = 32,
    dtype: str = "float16",
) -> Path:
    """Write a random model, its tokenizer and its settings to `folder` and return it.

    Tiles of `tile` pixels (a multiple of 16), at most 2 x 2 of them and a global one; weights are
    drawn from `seed` and about four times as large as usual, so that greedy text varies.
    `dtype`: float16, bfloat16 or float32.
    """
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config = Idefics3Config(
        **_config(vocabulary, tied, layers, hidden, heads, kv_heads, vision_hidden, tile)
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    _write_settings(folder, tile, vocabulary)
    return folder


def write_tokenizer(folder: Path, row_col_tokens: bool = True) -> dict[str, int]:
    """Train a byte-level BPE tokenizer with SmolVLM's special tokens; returns the vocabulary.

    `row_col_tokens=False` leaves the row and column markers plain text, as the 2.2B model has them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    markers = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    tokenizer.add_special_tokens(
        [
            *(["<global-img>", *markers] if row_col_tokens else []),
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ],
        "model_max_length": 512,
    }
    _dump(folder / "tokenizer_config.json", settings)
    return vocabulary


def _config(
    vocabulary: dict[str, int],
    tied: bool,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    vision_hidden: int,
    tile: int,
) -> dict[str, Any]:
    text = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "pad_token_id": vocabulary["<|im_end|>"],
        "bos_token_id": vocabulary["<|im_start|>"],
        "eos_token_id": vocabulary["<end_of_utterance>"],
        "tie_word_embeddings": tied,
    }
    vision = {
        "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "image_size": tile,
        "layer_norm_eps": 1e-6,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "scale_factor": SHUFFLE,
        "image_token_id": vocabulary["<image>"],
        "pad_token_id": vocabulary["<|im_end|>"],
        "tie_word_embeddings": tied,
    }


def _write_settings(folder: Path, tile: int, vocabulary: dict[str, int]) -> None:
    _dump(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": tile},
            "processor_class": "Idefics3Processor",
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 2 * tile},
        },
    )
    tokens = int(np.square(tile // PATCH // SHUFFLE))
    _dump(
        folder / "processor_config.json",
        {"image_seq_len": tokens, "processor_class": "Idefics3Processor"},
    )
    _dump(folder / "chat_template.json", {"chat_template": TEMPLATE})
    _dump(
        folder / "generation_config.json",
        {
            "bos_token_id": vocabulary["<|im_start|>"],
            "eos_token_id": vocabulary["<end_of_utterance>"],
            "pad_token_id": vocabulary["<|im_end|>"],
        },
    )


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
