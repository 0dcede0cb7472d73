"""Tiny random LLaVA model folders, laid out as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

TILE, PATCH = 32, 8
TOKENS = (TILE // PATCH) ** 2
GRID = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96], [128, 128]]
CONTEXT = 640
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SENTENCES = (
    "Describe this medical image. USER: ASSISTANT: [INST] [/INST]",
    "Chest X-ray, frontal view, with a moderate left pleural effusion and no pneumothorax.",
    "Axial CT of the abdomen shows a 19 mm lesion in the right lobe of the liver.",
    "Ultrasound of the gallbladder: no stones. MRI of the brain, T2, normal.",
)
# As published with llava-1.5-7b-hf.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The form of llava-v1.6-mistral-7b-hf.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
# Newest stem to the published one.
PUBLISHED = (
    ("lm_head", "language_model.lm_head"),
    ("model.language_model", "language_model.model"),
    ("model.vision_tower", "vision_tower.vision_model"),
    ("model.multi_modal_projector", "multi_modal_projector"),
    ("model.image_newline", "image_newline"),
)
# The original LLaVA code's names, as LLaVA-Med publishes them.
LLAVA_MED = (
    ("model.language_model", "model"),
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("model.vision_tower", "model.vision_tower.vision_tower.vision_model"),
)

Kind = Literal["llava", "llava_next"]
Decoder = Literal["llama", "mistral"]


def write_tiny_llava(
    folder: Path,
    *,
    kind: Kind = "llava",
    decoder: Decoder = "llama",
    seed: int = 0,
    dtype: str = "float16",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random model in the published layout and names, its tokenizer and its settings.

    `vision`, `text` and `top` change keys of config.json. Weights are drawn from `seed`, about four
    times as large as usual, so that greedy text varies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, image=True)
    config = _config(kind, decoder, ids, vision or {}, text or {}, top)
    tensors = _random_tensors(kind, config, seed, dtype)
    _save(folder, tensors, PUBLISHED)
    _dump(folder / "config.json", config)
    _write_settings(folder, kind, decoder, ids, config)
    return folder


def write_tiny_llava_med(folder: Path, *, seed: int = 0) -> Path:
    """The same with a Mistral decoder, in LLaVA-Med's layout: llava_mistral and the original names."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, image=False)
    config = _config("llava", "mistral", ids, {}, {}, {"image_token_index": 0})
    tensors = _random_tensors("llava", config, seed, "float16")
    _save(folder, tensors, LLAVA_MED)
    text = {
        k: v for k, v in config["text_config"].items() if k not in ("model_type", "pad_token_id")
    }
    _dump(
        folder / "config.json",
        {
            **text,
            "architectures": ["LlavaMistralForCausalLM"],
            "model_type": "llava_mistral",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": config["vision_config"]["hidden_size"],
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "tie_word_embeddings": False,
            "vision_config": config["vision_config"],
        },
    )
    processor = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    _dump(folder / "preprocessor_config.json", {**_image_settings(), **processor})
    _dump(
        folder / "generation_config.json", {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    )
    return folder


def write_tokenizer(folder: Path, *, image: bool) -> dict[str, int]:
    """Train a tokenizer of Llama's kind: spaces as U+2581, bytes as a last resort, <s> in front."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = spaces
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False, special_tokens=names)
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    added = [*names, *(["<image>", "<pad>"] if image else [])]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>" if image else "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        **({"image_token": "<image>"} if image else {}),
    }
    _dump(folder / "tokenizer_config.json", settings)
    ids: dict[str, int] = tokenizer.get_vocab()
    return ids


def _config(
    kind: Kind,
    decoder: Decoder,
    ids: dict[str, int],
    vision: dict[str, Any],
    text: dict[str, Any],
    top: dict[str, Any],
) -> dict[str, Any]:
    sizes = {
        "model_type": decoder,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if decoder == "llama" else 2,
        "vocab_size": -(-len(ids) // 64) * 64 if "<image>" in ids else len(ids),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0 if decoder == "llama" else 1e6,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids.get("<pad>", 0),
    }
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 32,
    }
    if decoder == "mistral":
        sizes["sliding_window"] = None
    grid = {"image_grid_pinpoints": GRID} if kind == "llava_next" else {}
    name = "LlavaNext" if kind == "llava_next" else "Llava"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": ids.get("<image>", 0),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float16",
        **grid,
        "text_config": {**sizes, **text},
        "vision_config": {**tower, **vision},
        **top,
    }


def _random_tensors(kind: Kind, config: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    import torch
    import transformers

    name = "LlavaNext" if kind == "llava_next" else "Llava"
    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    parsed = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(parsed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = (0.05 if name.endswith("bias") else 0.08) * noise
        tensors[name] = value.to(getattr(torch, dtype))
    return tensors


def _save(folder: Path, tensors: dict[str, Any], names: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import save_file

    def renamed(name: str) -> str:
        for new, old in names:
            if name.startswith(f"{new}."):
                return old + name[len(new) :]
        return dict(names).get(name, name)

    stored = {renamed(name): value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _image_settings() -> dict[str, Any]:
    return {
        "crop_size": {"height": TILE, "width": TILE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": TILE},
    }


def _write_settings(
    folder: Path, kind: Kind, decoder: Decoder, ids: dict[str, int], config: dict[str, Any]
) -> None:
    name = "LlavaNext" if kind == "llava_next" else "Llava"
    images: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor"}
    if kind == "llava_next":
        images = {
            "image_processor_type": "LlavaNextImageProcessor",
            "aspect_ratio_setting": "anyres",
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "do_pad": True,
        }
    processor = {"processor_class": f"{name}Processor"}
    _dump(folder / "preprocessor_config.json", {**_image_settings(), **images, **processor})
    _dump(
        folder / "processor_config.json",
        {
            **processor,
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        },
    )
    template = MISTRAL_TEMPLATE if decoder == "mistral" else TEMPLATE
    _dump(folder / "chat_template.json", {"chat_template": template})
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    _dump(folder / "generation_config.json", {**special, "pad_token_id": ids["<pad>"]})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
