"""IDEFICS' settings, prompts and masks against transformers' own classes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.families.captioners.idefics import decoder_spec, open_preparer, tower_spec
from exporter.families.prompts.idefics import image_mask
from exporter.families.prompts.visible import VisibleImages
from exporter.families.specs.llama import require_llama
from tests.support.adapters import write_adapter
from tests.support.tiny_idefics import ADDED, write_tiny_idefics

PROMPT = "Describe this medical image."
PUBLISHED = find_model("idefics-9b-instruct")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of dotted keys."""
    config: dict[str, Any] = {"model_type": "idefics"}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    return config


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return nested(known_config(PUBLISHED))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("idefics")
    out = root / "merged"
    out.mkdir()
    merge_adapters(write_tiny_idefics(root / "base"), [], out)
    return out


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def test_the_published_sizes_are_all_tensors_of_the_class(published: dict[str, Any]) -> None:
    import transformers

    with torch.device("meta"):
        settings = {k: v for k, v in published.items() if k != "model_type"}
        model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**settings))
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tensors = [*decoder_spec(published).tensors(), *tower_spec(published).tensors()]
    found = {t.name: t.shape for t in tensors}
    assert len(found) == len(tensors)
    assert found == expected
    assert sum(math.prod(t.shape) for t in tensors) == PUBLISHED.facts.parameters


def test_absent_keys_take_the_defaults_of_the_class() -> None:
    import transformers

    config, spec = transformers.IdeficsConfig(), decoder_spec({"use_resampler": True})
    tower = tower_spec({"use_resampler": True})
    assert (spec.hidden_size, spec.layers, spec.heads) == (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert (spec.interval, spec.qk_norms) == (config.cross_layer_interval, config.qk_layer_norms)
    assert spec.vocab_size == config.vocab_size + config.additional_vocab_size
    assert spec.llama.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.llama.norm_eps == config.rms_norm_eps
    vision, perceiver = config.vision_config, config.perceiver_config
    assert (tower.tower.hidden_size, tower.tower.layers) == (
        vision.embed_dim,
        vision.num_hidden_layers,
    )
    assert (tower.tower.norm_eps, tower.tower.activation) == (
        vision.layer_norm_eps,
        vision.hidden_act,
    )
    assert (tower.perceiver.depth, tower.perceiver.heads, tower.perceiver.head_dim) == (
        perceiver.resampler_depth,
        perceiver.resampler_n_heads,
        perceiver.resampler_head_dim,
    )
    assert tower.perceiver.latents == perceiver.resampler_n_latents


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_resampler": False}, "use_resampler is False; only True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"cross_layer_interval": 3}, "32 layers with cross_layer_interval 3"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix'; expected float or vector"),
        ({"additional_vocab_size": -1}, "additional_vocab_size is -1; expected a positive"),
        ({"perceiver_config": 3}, "perceiver_config is 3; expected an object"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_bad_settings_are_refused(
    published: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputRefused, match=said) as caught:
        decoder_spec({**published, **change})
    assert "\n" not in str(caught.value)


def test_a_vector_of_gates_is_as_wide_as_the_decoder(published: dict[str, Any]) -> None:
    spec = decoder_spec({**published, "alpha_type": "vector"})
    assert spec.alpha == (1, 1, 4096)


def test_calibrated_schemes_say_that_they_know_llama_blocks_alone(
    published: dict[str, Any],
) -> None:
    with pytest.raises(InputRefused, match="GatedLlama; use int4-hqq or int4-rtn"):
        require_llama(decoder_spec(published), "scheme int4-gptq")


def processor(folder: Path) -> Any:
    """transformers' own processor, with the image processor that needs no torchvision."""
    import transformers
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
    from transformers.models.idefics.processing_idefics import IdeficsProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    images = IdeficsImageProcessorPil(
        image_size=settings["image_size"],
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )
    made = IdeficsProcessor.__new__(IdeficsProcessor)
    made.image_processor, made.tokenizer = images, tokenizer
    made.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    made.default_image_dims = (3, images.image_size, images.image_size)
    made.tokenizer_was_trained_with_end_of_utterance_token = (
        "<end_of_utterance>" in tokenizer.get_vocab()
    )
    return made


@pytest.mark.parametrize("sizes", [[(64, 48)], [(33, 97), (5, 8)], [(64, 48), (20, 20), (31, 33)]])
@pytest.mark.parametrize("instructed", [True, False])
def test_prompts_and_masks_are_those_of_the_processor(
    tmp_path: Path, sizes: list[tuple[int, int]], instructed: bool
) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    merge_adapters(write_tiny_idefics(tmp_path / "base", instructed=instructed), [], out)
    images = [noise(*size) for size in sizes]
    found = open_preparer(out).prepare(images, f" {PROMPT} ")
    expected = processor(out)(
        text=[["User:", *images, PROMPT, "\nAssistant:"]],
        add_special_tokens=False,
        add_end_of_utterance_token=None,
    )
    assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert found.image_mask is not None
    assert found.image_mask.tolist() == expected["image_attention_mask"][0].tolist()
    assert np.array_equal(found.pixel_values, expected["pixel_values"][0].numpy())


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(31, 97), (32, 32), (300, 41)])
def test_pixels_are_those_of_the_image_processor(
    merged: Path, size: tuple[int, int], mode: str
) -> None:
    image = noise(*size, mode)
    found = open_preparer(merged).prepare([image], PROMPT)
    expected = processor(merged).image_processor([image], return_tensors="np")
    assert np.array_equal(found.pixel_values, np.asarray(expected))


def test_masks_are_those_of_transformers_behind_an_end_of_text() -> None:
    from transformers.models.idefics.processing_idefics import (
        image_attention_mask_for_packed_input_ids,
        incremental_to_binary_attention_mask,
    )

    class Tokens:
        eos_token_id = 2

        def convert_tokens_to_ids(self, text: str) -> int:
            assert text == "<image>"
            return 9

    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.choice([2, 5, 6, 7, 9], 30, p=[0.1, 0.3, 0.3, 0.1, 0.2])
        count = max(1, int((ids == 9).sum()))
        places, _ = image_attention_mask_for_packed_input_ids(
            torch.from_numpy(ids)[None], Tokens(), "pt"
        )
        expected = incremental_to_binary_attention_mask(places, "pt", num_classes=count)[0]
        assert np.array_equal(image_mask(ids, 9, count, 2), expected.numpy())


def test_the_answer_sees_what_the_last_token_sees() -> None:
    prompt = np.array([[0, 0], [1, 0], [0, 1]], np.int64)
    visible = VisibleImages(prompt)
    first, second = visible.take(2), visible.take(3)
    assert first is not None
    assert second is not None
    assert first.tolist() == [[0, 0], [1, 0]]
    assert second.tolist() == [[0, 1]] * 3
    assert VisibleImages(None).take(4) is None


def test_the_published_text_is_written_where_there_is_no_template(merged: Path) -> None:
    preparer = open_preparer(merged)
    inputs = preparer.prepare([noise(8, 8), noise(9, 9)], PROMPT)
    text = preparer._text.tokenizer.decode(inputs.input_ids.tolist(), skip_special_tokens=False)
    fake, image, end = ADDED
    squeezed = text.replace(" ", "")
    said = f"<s>User:{fake}{image}{fake}{image}{fake}{PROMPT}{end}\nAssistant:"
    assert squeezed == said.replace(" ", "")
    assert preparer.image_token_id is None


def test_a_template_of_the_folder_is_kept(tmp_path: Path) -> None:
    base, out = write_tiny_idefics(tmp_path / "base"), tmp_path / "merged"
    path = base / "tokenizer_config.json"
    template = "{{ bos_token }}Q:{% for p in messages[0]['content'] %}{{ p.text or '<image>' }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    out.mkdir()
    merge_adapters(base, [], out)
    assert not (out / "chat_template.jinja").exists()
    inputs = open_preparer(out).prepare([noise(8, 8)], "Hi")
    assert open_preparer(out).decode(inputs.input_ids.tolist()) == "Q: Hi"


@pytest.mark.parametrize("marker", ["<image>", "<fake_token_around_image>"])
def test_typed_markers_are_refused(merged: Path, marker: str) -> None:
    with pytest.raises(InputRefused, match="contains the image marker"):
        open_preparer(merged).prepare([noise(8, 8)], f"Look: {marker}")


def test_a_prompt_without_an_image_is_refused(merged: Path) -> None:
    with pytest.raises(InputRefused, match="at least one"):
        open_preparer(merged).prepare([], PROMPT)


def test_other_image_sizes_are_refused(merged: Path, tmp_path: Path) -> None:
    for file in merged.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**settings, "image_size": 64}))
    with pytest.raises(InputRefused, match=r"become \(64, 64\), config.json's tower takes 32 x 32"):
        open_preparer(tmp_path)


def test_the_study_s_adapter_reaches_every_part(tmp_path: Path) -> None:
    """Suffixes match the decoder, the gated blocks, the perceiver and the tower alike."""
    base, out = write_tiny_idefics(tmp_path / "base"), tmp_path / "merged"
    targets = list(PUBLISHED.adapter.targets) if PUBLISHED.adapter else []
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=targets, lora_alpha=8)
    out.mkdir()
    proof = merge_adapters(base, [adapter], out)
    found = Counter(target.tensor.split(".")[1] for target in proof.targets)
    assert found == {
        "layers": 12,
        "gated_cross_attn_layers": 6,
        "perceiver_resampler": 6,
        "vision_model": 6,
    }


def test_adapters_of_the_model_without_its_head_merge_alike(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = write_tiny_idefics(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=8)
    merged = []
    for name in ("with", "without"):
        out = tmp_path / name
        out.mkdir()
        merge_adapters(base, [adapter], out)
        merged.append(load_file(out / "model.safetensors"))
        path = adapter / "adapter_model.safetensors"
        short = {
            k.replace("model.model.model.", "model.model."): v for k, v in load_file(path).items()
        }
        save_file(short, path)
    assert all(np.array_equal(merged[0][name], merged[1][name]) for name in merged[0])
    plain = load_file(base / "model.safetensors")
    changed = [name for name, value in merged[1].items() if not np.array_equal(plain[name], value)]
    assert len(changed) == 10
