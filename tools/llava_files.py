"""The LLaVA demo's folder without weights, laid out as llava-1.5-7b-hf is published."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IMAGE, PATCH = 112, 14
PATCHES = (IMAGE // PATCH) ** 2
CONTEXT = 512
PROMPT = "Describe the image."
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
UNKNOWN, BEGIN, END, PICTURE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt_text(images: int = PATCHES) -> str:
    """The prompt as the template renders it, with `images` image tokens."""
    return f"USER: {PICTURE * images}\n{PROMPT} ASSISTANT:"


def write_model_files(folder: Path, captions: Iterable[str], vocabulary: int) -> dict[str, Any]:
    """Train the tokenizer and write every file but the weights; returns the config as a mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder, captions, vocabulary)
    config = _config(ids)
    tokens = {"bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    _dump(folder / "config.json", config)
    _dump(folder / "generation_config.json", tokens)
    _dump(folder / "preprocessor_config.json", _preprocessor())
    _dump(folder / "processor_config.json", _processor())
    _dump(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return config


def _write_tokenizer(folder: Path, captions: Iterable[str], size: int) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[UNKNOWN, BEGIN, END],
    )
    tokenizer.train_from_iterator([*captions, f"USER: \n{PROMPT} ASSISTANT:"], trainer)
    tokenizer.add_special_tokens([PICTURE, PAD])
    ids: dict[str, int] = dict(tokenizer.get_vocab())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD}
    settings = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "image_token": PICTURE,
        "extra_special_tokens": {"image_token": PICTURE},
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    _dump(folder / "tokenizer_config.json", settings)
    _dump(folder / "special_tokens_map.json", {**named, "image_token": PICTURE})
    return ids


def _config(ids: dict[str, int]) -> dict[str, Any]:
    rows = -(-len(ids) // 64) * 64
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "ignore_index": -100,
        "image_token_index": ids[PICTURE],
        "image_seq_length": PATCHES,
        "pad_token_id": ids[PAD],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vocab_size": rows,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": rows,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": ids[BEGIN],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 3,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "projection_dim": 192,
            "layer_norm_eps": 1e-5,
        },
    }


def _preprocessor() -> dict[str, Any]:
    # Phantoms are up to twice as wide as high. Resizing both edges keeps all of them in the picture,
    # where a shortest edge with a centre crop, as llava-1.5-7b-hf has it, would cut organs off.
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE, "width": IMAGE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _processor() -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": PICTURE,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
