"""Tiny random CLIP model folders, laid out as the published ones are, and CheXzero's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIDE, PATCH, CONTEXT, PROJECTION = 32, 8, 24, 40
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
START, END = "<|startoftext|>", "<|endoftext|>"
SENTENCES = (
    "a photo of a chest x-ray with a moderate left pleural effusion and no pneumothorax.",
    "axial ct of the abdomen shows a 19 mm lesion in the right lobe of the liver.",
    "ultrasound of the gallbladder: no stones. mri of the brain, t2, normal.",
)


def write_tiny_clip(
    folder: Path,
    *,
    seed: int = 0,
    legacy: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random model in the published layout and names, its tokenizer and its settings.

    `legacy`: eos_token_id is 2, as in OpenAI's configs; else the tokenizer's own. `vision`, `text`
    and `top` change keys of config.json. Weights are drawn from `seed`, about four times as large as
    usual.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_clip_tokenizer(folder)
    config = clip_config(ids, legacy=legacy, vision=vision or {}, text=text or {}, top=top)
    _dump(folder / "config.json", config)
    _dump(folder / "preprocessor_config.json", image_settings())
    save_tensors(folder, random_tensors(config, seed))
    return folder


def write_tiny_chexzero(folder: Path, *, seed: int = 0, square: int = 320) -> Path:
    """Write a random model in the original code's layout, heads of 64, and its tokenizer.

    The image settings are those that merging writes; `square` other than 320 writes them.
    """
    from tests.support.plain_openai_clip import OpenaiClip, random_openai_clip

    folder.mkdir(parents=True, exist_ok=True)
    ids = write_clip_tokenizer(folder)
    model: OpenaiClip = random_openai_clip(len(ids), CONTEXT, SIDE, PATCH, PROJECTION, seed)
    state = {n: v.half() for n, v in model.state_dict().items()}
    save_tensors(folder, state)
    _dump(folder / "config.json", {"model_type": "chexzero"})
    if square != 320:
        settings = {
            "image_processor_type": "CheXzeroImageProcessor",
            "square": square,
            "image_mean": 101.48761,
            "image_std": 83.43944,
        }
        _dump(folder / "preprocessor_config.json", settings)
    return folder


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """Train a tokenizer of CLIP's kind (lower case, ``</w>`` ends a word) and write its files.

    Returns the ids of its tokens; those of start and end are the highest.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    # The class gives normaliser and splitting; only vocabulary and merges are trained.
    empty = CLIPTokenizer()
    words = []
    for sentence in SENTENCES:
        lower = empty.backend_tokenizer.normalizer.normalize_str(sentence)
        words += [w for w, _ in empty.backend_tokenizer.pre_tokenizer.pre_tokenize_str(lower)]
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    trained.train_from_iterator([" ".join(words)], trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for byte in alphabet:
        vocabulary.setdefault(f"{byte}</w>", len(vocabulary))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return vocabulary


def clip_config(
    ids: dict[str, int],
    *,
    legacy: bool,
    vision: dict[str, Any],
    text: dict[str, Any],
    top: dict[str, Any],
) -> dict[str, Any]:
    """config.json in the form of the published ones."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": PROJECTION,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float16",
        "text_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": len(ids),
            "max_position_embeddings": CONTEXT,
            "bos_token_id": 0 if legacy else ids[START],
            "eos_token_id": 2 if legacy else ids[END],
            "pad_token_id": 1,
            "projection_dim": PROJECTION,
            **text,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": PROJECTION,
            **vision,
        },
        **top,
    }


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random float16 weights of the CLIPModel of a config.json, under their names in the model."""
    import torch
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**settings))
    return {name: value.half() for name, value in random_values(model, seed).items()}


def random_values(model: Any, seed: int) -> dict[str, Any]:
    """Random float32 values for every parameter of a torch model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            value = torch.tensor(2.5)
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = (0.05 if name.endswith("bias") else 0.08) * noise
        tensors[name] = value
    return tensors


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json in the form of the published ones."""
    return {
        "crop_size": SIDE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": SIDE,
    }


def save_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Write model.safetensors."""
    from safetensors.torch import save_file

    stored = {name: value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
