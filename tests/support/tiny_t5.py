"""A tiny random T5's folder, laid out as the published one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import SENTENCES

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
POSITIONS = 320
HEAD, EMBEDDING = "lm_head.weight", "shared.weight"


def write_tiny_t5(
    folder: Path, *, seed: int = 0, dtype: str = "float16", own_head: bool = False, **changes: Any
) -> Path:
    """Write a random model, its tokenizer and its settings, and return `folder`.

    `changes` are keys of config.json (None takes one out). `own_head`: the head is stored beside the
    embedding, and is another matrix, as T5 1.1 has it. Weights are drawn so that greedy text varies.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = _config(write_unigram_tokenizer(folder))
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    torch.manual_seed(seed)
    parsed = transformers.T5Config.from_dict(config)
    model = transformers.T5ForConditionalGeneration(parsed)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "layer_norm" in name:
            values = 1 + 0.1 * noise
        elif "relative_attention_bias" in name:
            values = 0.5 * noise
        elif name == EMBEDDING:
            values = 0.1 * noise
        else:
            # Scores are not divided by the width of a head: queries are small instead.
            factor = {"q": 0.5, "o": 2.0}.get(name.split(".")[-2], 1.2)
            values = factor * parameter.shape[-1] ** -0.5 * noise
        tensors[name] = values.to(getattr(torch, dtype))
    if own_head:
        shape = tensors[EMBEDDING].shape
        head = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        tensors[HEAD] = head.to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _dump(folder / "config.json", config)
    return folder


def _config(words: int) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 64,
        "d_ff": 96,
        # As in larger T5, the heads together are not as wide as the hidden state.
        "d_kv": 16,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "n_positions": POSITIONS,
        "vocab_size": words + 5,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
    }


def write_unigram_tokenizer(folder: Path) -> int:
    """Train a Unigram tokenizer with T5's special tokens; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    meta = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**meta)]
    )
    tokenizer.decoder = decoders.Metaspace(**meta)
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        show_progress=False,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
    )
    tokenizer.train_from_iterator([*SENTENCES, "summarize: findings impression"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "extra_ids": 0,
        "model_max_length": POSITIONS,
    }
    _dump(folder / "tokenizer_config.json", settings)
    size: int = tokenizer.get_vocab_size()
    return size


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
