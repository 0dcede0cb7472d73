"""Checkpoints of published shapes with random weights, complete enough to be built and asked.

Time, memory and bytes do not depend on the values of the weights. The tokenizer has the published
number of entries and the published ids of the special tokens; its other entries are bytes and
fillers, so a prompt has about as many tokens as characters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.tensors import SafetensorsWriter
from exporter.families.table import family_of

SHARD = 5_000_000_000
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_checkpoint(folder: Path, model: str, layers: int | None = None) -> None:
    """Write float16 shards of at most `SHARD` bytes, their index and the small files of `model`.

    `layers` limits the decoder where the profile counts them in its text_config.
    """
    config = config_of(model)
    if layers:
        whole = config["text_config"]["num_hidden_layers"]
        config["text_config"]["num_hidden_layers"] = min(layers, whole)
    family = family_of(config)
    parts = (family.decoder_spec(config), family.tower_spec(config))
    table = {t.name: t.shape for part in parts for t in part.tensors()}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_shards(partial, table)
    _dump(partial / "config.json", config)
    write_small_files(partial, model, config)
    partial.rename(folder)


def config_of(model: str) -> dict[str, Any]:
    """The config.json that the profile's facts describe."""
    profile = find_model(model)
    config: dict[str, Any] = {"model_type": profile.facts.model_type}
    if profile.family == "moondream":
        return _moondream_config(known_config(profile))
    for key, value in known_config(profile).items():
        place, *_, last = config, *key.split(".")
        if "." in key:
            place = config.setdefault(key.split(".")[0], {})
        place[last] = list(value) if isinstance(value, tuple) else value
    if "rope_scaling" in config:
        config["rope_scaling"]["type"] = "mrope"
    return config


def _moondream_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The published layout of Moondream2, whose facts are recorded under transformers' names."""
    text = {k.removeprefix("text_config."): v for k, v in facts.items()}
    vision = {k.removeprefix("vision_config."): v for k, v in facts.items()}
    words = {"query": {"prefix": [10, 10], "suffix": [11, 11]}, "caption": {"normal": [12, 12]}}
    return {
        "architectures": ["HfMoondream"],
        "model_type": "moondream1",
        "torch_dtype": "float16",
        "config": {
            "text": {
                "dim": text["hidden_size"],
                "ff_dim": text["intermediate_size"],
                "n_layers": text["num_hidden_layers"],
                "n_heads": text["num_attention_heads"],
                "vocab_size": text["vocab_size"],
                "max_context": text["max_position_embeddings"],
                "prefix_attn": facts["prefix_attention"],
            },
            "vision": {
                "enc_dim": vision["hidden_size"],
                "enc_patch_size": vision["patch_size"],
                "enc_n_layers": vision["num_hidden_layers"],
                "enc_ff_dim": vision["intermediate_size"],
                "enc_n_heads": vision["num_attention_heads"],
                "proj_out_dim": text["hidden_size"],
                "crop_size": vision["image_size"],
                "in_channels": 3,
                "max_crops": vision["max_crops"],
                "overlap_margin": vision["overlap_margin"],
                "proj_inner_dim": vision["projection_inner_size"],
            },
            "tokenizer": {"bos_id": 50256, "eos_id": 50256, "templates": words},
        },
    }


def write_shards(folder: Path, table: Mapping[str, tuple[int, ...]]) -> None:
    """Write random float16 tensors of these shapes and the index of their shards."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, size in table.items():
        bytes_ = 2 * int(np.prod(size, dtype=np.int64))
        if shards[-1] and used + bytes_ > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = size
        used += bytes_
    noise = 0.02 * np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file, {n: ("F16", s) for n, s in shard.items()}) as writer:
            for name, size in shard.items():
                writer.write(name, random_values(name, size, noise))
                weight_map[name] = file
    _dump(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def random_values(
    name: str, shape: tuple[int, ...], noise: NDArray[np.float32]
) -> NDArray[np.float16]:
    """Values from the noise, starting where the name's hash says: drawing 7e9 anew takes minutes."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "little") % noise.size
    values = np.resize(np.roll(noise, start).astype(np.float16), shape)
    module = name.rpartition(".")[0].rpartition(".")[2]
    norm = name.endswith("weight") and (
        "norm" in module or module in ("ln", "ln1", "ln2", "post_ln")
    )
    return values + np.float16(1) if norm else values


def write_small_files(folder: Path, model: str, config: Mapping[str, Any]) -> None:
    """Tokenizer, template and image settings as far as a runtime asks for them."""
    facts = find_model(model).facts
    image = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    stops = facts.generation.get("eos_token_id")
    _dump(folder / "generation_config.json", {"eos_token_id": stops})
    match find_model(model).family:
        case "llava":
            side = config["vision_config"]["image_size"]
            image |= {
                "image_processor_type": "CLIPImageProcessor",
                "do_center_crop": True,
                "crop_size": {"height": side, "width": side},
                "size": {"shortest_edge": side},
            }
            _dump(folder / "preprocessor_config.json", image)
            _dump(
                folder / "processor_config.json",
                {
                    "patch_size": config["vision_config"]["patch_size"],
                    "vision_feature_select_strategy": "default",
                    "num_additional_image_tokens": 1,
                    "image_token": "<image>",
                },
            )
            special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": config["image_token_index"]}
            write_tokenizer(folder, config["text_config"]["vocab_size"], special, "</s>")
            _dump(folder / "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
        case "qwen_vl":
            image |= {
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
            }
            _dump(folder / "preprocessor_config.json", image)
            names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            special = {name: 151643 + i for i, name in enumerate(names)}
            special |= {"<|vision_start|>": 151652, "<|vision_end|>": 151653}
            special |= {"<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
            write_tokenizer(folder, 151657, special, "<|im_end|>")
            _dump(folder / "chat_template.json", {"chat_template": QWEN_TEMPLATE})
        case "idefics3":
            tile = config["vision_config"]["image_size"]
            image |= {
                "image_processor_type": "Idefics3ImageProcessor",
                "do_image_splitting": True,
                "do_pad": True,
                "resample": 1,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "max_image_size": {"longest_edge": tile},
                "size": {"longest_edge": 4 * tile},
            }
            _dump(folder / "preprocessor_config.json", image)
            _dump(folder / "processor_config.json", {"image_seq_len": 64})
            special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
            markers = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
            names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
            special |= {"<image>": 49190, "<fake_token_around_image>": 49189}
            special |= {"<global-img>": 49152, "<end_of_utterance>": 49279}
            special |= {name: 49153 + i for i, name in enumerate(markers)}
            write_tokenizer(folder, config["text_config"]["vocab_size"], special, names[-1])
            _dump(folder / "chat_template.json", {"chat_template": SMOL_TEMPLATE})
        case "moondream":
            write_tokenizer(folder, 50257, {"<|endoftext|>": 50256}, "<|endoftext|>")
        case other:
            raise ValueError(f"no small files are known for family {other}")


def write_tokenizer(folder: Path, size: int, special: Mapping[str, int], stop: str) -> None:
    """A byte-level tokenizer without merges: `size` entries, special tokens at their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary: dict[str, int] = dict(special)
    free = (i for i in range(size) if i not in set(special.values()))
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[token] = next(free)
    for index in free:
        vocabulary[f"<filler-{index}>"] = index
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": stop},
    )


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
