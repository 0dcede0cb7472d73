"""Tiny random IDEFICS model folders, laid out as the published one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIDE, LATENTS, CONTEXT = 32, 6, 320
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
SENTENCES = (
    "User: Describe this medical image.\nAssistant: Chest X-ray, frontal view, normal.",
    "Axial CT of the abdomen shows a 19 mm lesion in the right lobe of the liver.",
    "Ultrasound of the gallbladder: no stones. MRI of the brain, T2, with an effusion.",
)


def write_tiny_idefics(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float16",
    instructed: bool = True,
    vision: dict[str, Any] | None = None,
    perceiver: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random model, its tokenizer and its settings; `instructed` adds ``<end_of_utterance>``.

    `vision`, `perceiver` and `top` change keys of config.json. Weights are drawn from `seed`, about
    six times as large as usual, so that greedy text varies; gates are far from zero, which would
    hide the image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    added = ADDED if instructed else ADDED[:2]
    ids = _write_tokenizer(folder, added)
    config = _config(ids, len(added), vision or {}, perceiver or {}, top)
    _save(folder, _random_tensors(config, seed, dtype))
    _dump(folder / "config.json", config)
    # As published: an image_size, no image_processor_type, no chat template anywhere.
    images = {"image_num_channels": 3, "image_size": SIDE, "image_mean": MEAN, "image_std": STD}
    _dump(folder / "preprocessor_config.json", {**images, "processor_class": "IdeficsProcessor"})
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": 0}
    _dump(folder / "generation_config.json", special)
    return folder


def _write_tokenizer(folder: Path, added: tuple[str, ...]) -> dict[str, int]:
    """A tokenizer of Llama's kind whose added tokens stand behind its vocabulary."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = spaces
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=180, show_progress=False, special_tokens=names)
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
    tokens = [AddedToken(t, normalized=False, special=True) for t in [*names, *added]]
    tokenizer.add_special_tokens(tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": list(added),
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    _dump(folder / "tokenizer_config.json", settings)
    ids: dict[str, int] = tokenizer.get_vocab()
    return ids


def _config(
    ids: dict[str, int],
    added: int,
    vision: dict[str, Any],
    perceiver: dict[str, Any],
    top: dict[str, Any],
) -> dict[str, Any]:
    tower = {
        "embed_dim": 48,
        "image_size": SIDE,
        "intermediate_size": 96,
        "patch_size": 8,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
    }
    resampler = {
        "qk_layer_norms_perceiver": True,
        "resampler_depth": 2,
        "resampler_head_dim": 8,
        "resampler_n_heads": 4,
        "resampler_n_latents": LATENTS,
    }
    return {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "additional_vocab_size": added,
        "alpha_initializer": "zeros",
        "alpha_type": "float",
        "bos_token_id": ids["<s>"],
        "cross_layer_interval": 2,
        "eos_token_id": ids["</s>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "pad_token_id": 0,
        "qk_layer_norms": True,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_resampler": True,
        "vocab_size": len(ids) - added,
        "vision_config": {**tower, **vision},
        "perceiver_config": {**resampler, **perceiver},
        **top,
    }


def _random_tensors(config: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    import torch
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".alpha_" in name:
            value = 0.4 + 0.1 * noise
        elif name.endswith("latents"):
            value = noise
        elif ("norm" in name or ".ln." in name) and name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = (0.05 if name.endswith("bias") else 0.12) * noise
        tensors[name] = value.to(getattr(torch, dtype))
    return tensors


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    stored = {name: value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
