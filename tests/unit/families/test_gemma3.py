"""Gemma 3's pixels, prompts, masks and names against transformers' own; and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.gemma3 import (
    CONFIG_DEFAULTS,
    LAYOUTS,
    decoder_spec,
    open_preparer,
    tower_spec,
)
from exporter.families.check import config_value
from exporter.families.shapes.find import shape_of_config
from exporter.families.specs.gemma3 import (
    Gemma3Decoder,
    PooledSiglip,
    Rotary,
    seen_positions,
)
from tests.support.adapters import write_adapter
from tests.support.tiny_gemma3 import (
    BEGIN,
    ROWS,
    SIDE,
    SOFT,
    SOFT_ID,
    TEMPLATE,
    WINDOW,
    write_tiny_gemma3,
)

torch.set_num_threads(1)
PROMPT = "Describe this medical image."
# As google/gemma-3-4b-it publishes it, with the keys that are left out there left out here.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
# Stems of the newest names, and what transformers 4.50 to 4.51 and 4.52 to 4.57 saved in their place.
OLDER = {
    "4.51": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "4.57": (("model.vision_tower.", "model.vision_tower.vision_model."),),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Gemma3Processor:
    settings = json.loads((tiny / "preprocessor_config.json").read_text())
    kept = {
        k: v for k, v in settings.items() if v is not None and not k.endswith(("_type", "_class"))
    }
    images = Gemma3ImageProcessorPil(**kept)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=ROWS)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def changed(**changes: Any) -> dict[str, Any]:
    """The published config with keys of its sections, or of the whole, changed."""
    config: dict[str, Any] = json.loads(json.dumps(PUBLISHED))
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (config[section] if section else config)[leaf] = value
    return config


def specs(config: dict[str, Any]) -> tuple[Gemma3Decoder, PooledSiglip]:
    return decoder_spec(config), tower_spec(config)


def edited(folder: Path, name: str, **values: Any) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, **values}))


@pytest.mark.parametrize("sizes", [[], [(64, 64)], [(97, 31), (13, 77)], [(40, 90)] * 3])
def test_tokens_pixels_and_kinds_are_the_processors(
    tiny: Path, processor: Gemma3Processor, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(*size) for size in sizes]
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": f"  {PROMPT} "}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    # transformers' tokenizer does not write the first token twice where it is told not to.
    expected = processor(
        text=text, images=images or None, return_tensors="np", add_special_tokens=False
    )
    found = open_preparer(tiny).prepare(images, f"  {PROMPT} ")
    assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert (found.input_ids == SOFT_ID).sum() == len(images) * ROWS
    assert found.positions is not None
    place, last = found.positions
    kinds = expected["token_type_ids"][0] if images else np.zeros(len(place))
    assert ((last > place) | np.isin(place, last[last > place])).tolist() == (kinds == 1).tolist()
    if images:
        assert found.pixel_values.shape[1:] == (3, SIDE, SIDE)
        assert np.array_equal(found.pixel_values, expected["pixel_values"])


def test_an_image_is_written_between_newlines(tiny: Path) -> None:
    preparer = open_preparer(tiny)
    ids = preparer.prepare([picture(50, 60)], PROMPT).input_ids
    text = preparer._text.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    whole = f"\n\n{BEGIN}{SOFT * ROWS}<end_of_image>\n\n{PROMPT}<end_of_turn>\n<start_of_turn>model"
    assert text.strip() == f"<bos><start_of_turn>user\n{whole}"


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12))
def test_positions_say_what_transformers_masks_say(image: list[bool], window: int) -> None:
    config = Gemma3Config(
        text_config={"sliding_window": window, "num_hidden_layers": 6, "hidden_size": 8}
    ).get_text_config()
    config._attn_implementation = "eager"
    kinds = torch.tensor([image]).long()
    length = len(image)
    masks = create_masks_for_vision_model(
        config,
        torch.zeros(1, length, 8),
        None,
        None,
        torch.arange(length)[None],
        get_block_sequence_ids_for_mask(kinds),
    )
    place, last = seen_positions(np.array(image))
    keys = np.arange(length)
    reached = keys[None] <= last[:, None]
    within = keys[None] > place[:, None] - window
    assert np.array_equal(masks["full_attention"][0, 0].numpy() == 0, reached)
    assert np.array_equal(masks["sliding_attention"][0, 0].numpy() == 0, reached & within)


def test_specs_hold_every_tensor_of_the_published_size() -> None:
    config = {k: v for k, v in PUBLISHED.items() if k != "model_type"}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(**config))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    tensors = [*decoder_spec(PUBLISHED).tensors(), *tower_spec(PUBLISHED).tensors()]
    assert {t.name: t.shape for t in tensors} == expected
    assert len(tensors) == len(expected)
    count = sum(map(math.prod, expected.values()))
    shape = shape_of_config("Gemma 3 4B", "gemma3", PUBLISHED, {})
    assert shape.parameters == count == 4_300_079_472


def test_specs_of_what_transformers_5_saves_are_the_same() -> None:
    config = {k: v for k, v in PUBLISHED.items() if k != "model_type"}
    saved = Gemma3Config(**config).to_dict()
    assert "rope_parameters" in saved["text_config"]
    assert "layer_types" in saved["text_config"]
    assert decoder_spec(saved) == decoder_spec(PUBLISHED)
    assert tower_spec(saved) == tower_spec(PUBLISHED)


def test_every_sixth_layer_sees_everything() -> None:
    spec = decoder_spec(PUBLISHED)
    assert [i for i, window in enumerate(spec.windows) if not window] == [5, 11, 17, 23, 29]
    assert set(spec.windows) == {0, 1024}
    assert (spec.full_rotary, spec.sliding_rotary) == (Rotary(1e6, 8.0), Rotary(1e4))
    other = decoder_spec(changed(text_config__sliding_window_pattern=2))
    assert [bool(window) for window in other.windows[:4]] == [True, False, True, False]


def test_defaults_are_those_of_the_config_classes() -> None:
    real = Gemma3Config(vision_config={}).to_dict()
    kinds = {"rope_theta": "full_attention", "rope_local_base_freq": "sliding_attention"}
    for key in CONFIG_DEFAULTS:
        section, _, leaf = key.rpartition(".")
        place = real[section] if section else real
        if leaf in kinds:
            place, leaf = place["rope_parameters"][kinds[leaf]], "rope_theta"
        empty: dict[str, Any] = {"text_config": {}, "vision_config": {}}
        assert config_value(empty, key, "gemma3") == place[leaf], key


@pytest.mark.parametrize("version", sorted(OLDER))
def test_older_names_become_the_newest(version: str) -> None:
    (layout,) = LAYOUTS
    names = [t.name for t in (*decoder_spec(PUBLISHED).tensors(), *tower_spec(PUBLISHED).tensors())]
    for name in (*names, "lm_head.weight"):
        older = name
        for new, old in OLDER[version]:
            if name.startswith(new):
                older = old + name.removeprefix(new)
        assert layout.canonical(older) == name == layout.canonical(name)


def test_a_merge_gives_the_tensors_that_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    """The published folder, read by transformers' own conversion."""
    merge_adapters(tiny, [], tmp_path)
    model = Gemma3ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float16)
    expected = {n: p.detach().numpy() for n, p in model.named_parameters()}
    merged = Checkpoint.open(tmp_path)
    assert merged.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(merged.raw(name), values), name


def renamed_adapter(folder: Path, out: Path, pairs: tuple[tuple[str, str], ...]) -> Path:
    """The adapter of `folder` with the keys that an older transformers would have given it."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    path, before = out / "adapter_model.safetensors", "base_model.model."

    def older(key: str) -> str:
        for new, old in pairs:
            if key.startswith(before + new):
                return before + old + key.removeprefix(before + new)
        return key

    save_file({older(k): v for k, v in load_file(path).items()}, path)
    return out


@pytest.mark.parametrize("version", sorted(OLDER))
def test_adapters_of_older_versions_merge_alike(tiny: Path, tmp_path: Path, version: str) -> None:
    newest = write_adapter(tiny, tmp_path / "newest", target_modules="all-linear")
    older = renamed_adapter(newest, tmp_path / "older", OLDER[version])
    merged = []
    for adapter in (newest, older):
        out = tmp_path / f"{adapter.name}-merged"
        out.mkdir()
        merge_adapters(tiny, [adapter], out)
        merged.append(Checkpoint.open(out))
    assert merged[0].tensors.keys() == merged[1].tensors.keys()
    for name in merged[0].tensors:
        assert np.array_equal(merged[0].raw(name), merged[1].raw(name)), name


def test_a_head_saved_beside_the_embedding_unties_it(tiny: Path, tmp_path: Path) -> None:
    """As Google's fine-tuning notebook saves it: modules_to_save lm_head and embed_tokens."""
    adapter = write_adapter(
        tiny,
        tmp_path / "adapter",
        target_modules="all-linear",
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    out = tmp_path / "merged"
    out.mkdir()
    merge_adapters(tiny, [adapter], out)
    config = json.loads((out / "config.json").read_text())
    spec, tensors = decoder_spec(config), Checkpoint.open(out)
    assert not spec.tied
    assert not np.array_equal(tensors.raw(spec.head), tensors.raw(spec.embedding))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config__final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"text_config__attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"text_config__use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"text_config__attention_bias": True}, "attention_bias"),
        ({"text_config__hidden_activation": "silu"}, "hidden_activation"),
        ({"text_config__model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"text_config__head_dim": 20}, "heads of 20"),
        ({"text_config__layer_types": ["full_attention"]}, "layer_types"),
        ({"text_config__rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"text_config__rope_scaling": 8}, "expected an object"),
        ({"vision_config__vision_use_head": None}, "vision_use_head"),
        ({"vision_config__num_channels": 1}, "1 channels"),
        ({"vision_config__model_type": "clip_vision_model"}, "siglip_vision_model"),
        ({"mm_tokens_per_image": 250}, "cannot be averaged"),
        ({"mm_tokens_per_image": 225}, "cannot be averaged"),
    ],
)
def test_other_networks_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message) as caught:
        specs(changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan is True"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "takes 32 x 32"),
        ("preprocessor_config.json", {"size": {"longest_edge": 32}}, "longest_edge"),
        ("processor_config.json", {"image_seq_length": 256}, "image_seq_length is 256"),
        ("config.json", {"image_token_index": 5000}, "belong to different models"),
    ],
)
def test_other_images_and_tokens_are_refused(
    tiny: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    edited(folder, file, **values)
    with pytest.raises(InputRefused, match=message):
        open_preparer(folder)


@pytest.mark.parametrize("marker", [BEGIN, SOFT, "<end_of_image>"])
def test_a_typed_marker_is_refused(tiny: Path, marker: str) -> None:
    with pytest.raises(InputRefused, match=marker):
        open_preparer(tiny).prepare([picture(8, 8)], f"What is {marker}?")


def test_a_window_is_smaller_than_an_image_here() -> None:
    """Or the contract would not see windows and images meet."""
    assert WINDOW < ROWS
