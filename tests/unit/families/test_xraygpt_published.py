"""XrayGPT's layout: names both ways, biases joined, sizes of the published code, adapters' keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.blip2 import PUBLISHED, decoder_spec, tower_spec
from exporter.families.checkpoints import modern_config
from exporter.families.layouts.joined import Joined, JoinedCheckpoint, parted
from exporter.families.prompts.blip2 import read_blip_settings
from exporter.graphs.export import export_model
from exporter.runtimes.base import feature_rows
from exporter.runtimes.ort import OrtCaptioner
from tests.support.adapters import write_adapter
from tests.support.plain_xraygpt import image_features
from tests.support.tiny_blip2 import broken, write_tiny_xraygpt

torch.set_num_threads(1)
LAYOUT = PUBLISHED["mini_gpt4"]
XRAYGPT: dict[str, Any] = {"model_type": "mini_gpt4"}
# Read in the published code, and in transformers' conversion of the original BLIP-2.
KNOWN = {
    "query_tokens": "query_tokens",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual_encoder.blocks.38.norm1.weight": "vision_model.encoder.layers.38.layer_norm1.weight",
    "visual_encoder.blocks.0.norm2.bias": "vision_model.encoder.layers.0.layer_norm2.bias",
    "visual_encoder.blocks.0.attn.qkv.weight": "vision_model.encoder.layers.0.self_attn.qkv.weight",
    "visual_encoder.blocks.0.attn.q_bias": "vision_model.encoder.layers.0.self_attn.q_bias",
    "visual_encoder.blocks.0.attn.proj.weight": (
        "vision_model.encoder.layers.0.self_attn.projection.weight"
    ),
    "visual_encoder.blocks.0.mlp.fc1.weight": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "ln_vision.weight": "vision_model.post_layernorm.weight",
    "Qformer.bert.embeddings.LayerNorm.weight": "qformer.layernorm.weight",
    "Qformer.bert.encoder.layer.11.attention.self.query.weight": (
        "qformer.encoder.layer.11.attention.attention.query.weight"
    ),
    "Qformer.bert.encoder.layer.0.attention.output.LayerNorm.bias": (
        "qformer.encoder.layer.0.attention.output.LayerNorm.bias"
    ),
    "Qformer.bert.encoder.layer.10.crossattention.self.value.bias": (
        "qformer.encoder.layer.10.crossattention.attention.value.bias"
    ),
    "Qformer.bert.encoder.layer.10.crossattention.output.dense.weight": (
        "qformer.encoder.layer.10.crossattention.output.dense.weight"
    ),
    "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight": (
        "qformer.encoder.layer.1.intermediate_query.dense.weight"
    ),
    "Qformer.bert.encoder.layer.1.output_query.LayerNorm.weight": (
        "qformer.encoder.layer.1.output_query.LayerNorm.weight"
    ),
    "llama_proj.weight": "language_projection.weight",
    "llama_model.model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "llama_model.model.layers.31.self_attn.q_proj.weight": (
        "language_model.model.layers.31.self_attn.q_proj.weight"
    ),
    "llama_model.lm_head.weight": "language_model.lm_head.weight",
}


@pytest.fixture(scope="module")
def xraygpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xraygpt(tmp_path_factory.mktemp("xraygpt"))


@pytest.fixture(scope="module")
def merged(xraygpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    merge_adapters(xraygpt, [], out)
    return out


def test_known_names_both_ways() -> None:
    assert {old: LAYOUT.names.newest(old) for old in KNOWN} == KNOWN
    assert {LAYOUT.names.published(new): new for new in KNOWN.values()} == KNOWN


def test_a_checkpoint_goes_to_the_newest_names_and_back(xraygpt: Path, merged: Path) -> None:
    before, after = Checkpoint.open(xraygpt), Checkpoint.open(merged)
    config = json.loads((xraygpt / "config.json").read_text())
    expected = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    assert {t.name: t.shape for t in expected} == {n: i.shape for n, i in after.tensors.items()}
    back = parted(after, LAYOUT.joins).renamed(LAYOUT.names.published)
    assert back.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        assert np.array_equal(back.raw(name), before.raw(name))


def test_the_biases_of_the_tower_are_joined_as_its_code_joins_them(
    xraygpt: Path, merged: Path
) -> None:
    before, after = Checkpoint.open(xraygpt), Checkpoint.open(merged)
    query, value = (before.raw(f"visual_encoder.blocks.1.attn.{p}_bias") for p in "qv")
    joined = np.concatenate([query, np.zeros_like(value), value])
    found = after.raw("vision_model.encoder.layers.1.self_attn.qkv.bias")
    assert np.array_equal(found, joined)
    assert query.any()
    assert value.any()


def test_the_merged_folder_says_everything(xraygpt: Path, merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("blip-2", "llama")
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    published = json.loads((xraygpt / "config.json").read_text())
    assert decoder_spec(config) == decoder_spec(published)
    assert tower_spec(config) == tower_spec(published)
    assert (merged / "chat_template.jinja").read_text() == LAYOUT.files["chat_template.jinja"]


def test_published_sizes_stand_in_for_absent_ones() -> None:
    vision = tower_spec(XRAYGPT)
    assert (vision.tower.hidden_size, vision.tower.layers, vision.rows) == (1408, 39, 257)
    assert (vision.tower.intermediate_size, vision.tokens) == (int(1408 * 4.3637), 32)
    assert [i for i in range(vision.qformer.layers) if vision.qformer.sees(i)] == [
        0,
        2,
        4,
        6,
        8,
        10,
    ]
    images: Any = LAYOUT.files["preprocessor_config.json"]
    assert read_blip_settings(images, "").output() == (224, 224)


@pytest.mark.parametrize(
    "change", [{"vit_model": "clip_L"}, {"text_config": "vicuna"}, {"text_config": {"model_type": "opt"}}]
)  # fmt: skip
def test_other_models_of_the_original_code_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match=rf"config\.json: .*{next(iter(change))}"):
        modern_config({**XRAYGPT, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_bias": None}, "v_bias.* is missing"),
        ({"v_bias": np.zeros(47, np.float16)}, "expected equal parts"),
        ({"v_bias": np.zeros(48, np.float32)}, "expected equal parts"),
        ({"qkv.bias": np.zeros(144, np.float16)}, "expected equal parts and no"),
    ],
)
def test_parts_that_do_not_join_are_refused(
    xraygpt: Path, tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    named = {f"visual_encoder.blocks.0.attn.{name}": value for name, value in change.items()}
    folder = broken(xraygpt, tmp_path / "copy", named)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match=message):
        merge_adapters(folder, [], tmp_path / "out")


def test_a_bias_of_the_keys_has_no_published_place(merged: Path, tmp_path: Path) -> None:
    name = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    folder = broken(merged, tmp_path / "copy", {name: np.ones(144, np.float16)})
    with pytest.raises(InputRefused, match="no place in the published layout"):
        parted(Checkpoint.open(folder), LAYOUT.joins)


def test_joined_tensors_read_as_whole_ones(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = {f"x.{p}": random.standard_normal((2, 3)).astype(np.float16) for p in "ab"}
    save_file({**parts, "y": np.concatenate(list(parts.values()))}, tmp_path / "model.safetensors")
    stored = Checkpoint.open(tmp_path)
    found = JoinedCheckpoint(stored, [Joined(".whole", (".a", ".b"))])
    assert found.tensors.keys() == {"x.whole", "y"}
    assert (found.info("x.whole").shape, found.info("x.whole").nbytes) == ((4, 3), 24)
    assert np.array_equal(found.raw("x.whole"), stored.raw("y"))
    assert np.array_equal(found.float32("x.whole"), stored.float32("y"))
    assert found.same_bytes("x.whole", "y")
    assert found.same_bytes("y", "y")
    zeros = JoinedCheckpoint(stored, [Joined(".whole", (None, ".a"))])
    assert not zeros.same_bytes("x.whole", "y")


def test_an_adapter_of_the_published_names_fits(
    xraygpt: Path, merged: Path, tmp_path: Path
) -> None:
    """Trained on the original code's modules: its keys begin with llama_model and visual_encoder."""
    targets = ["q_proj", "v_proj", "qkv", "language_projection"]
    adapter = write_adapter(merged, tmp_path / "adapter", target_modules=targets)
    path = adapter / "adapter_model.safetensors"
    prefix = "base_model.model."
    renamed = {
        prefix + LAYOUT.names.published(name.removeprefix(prefix)): value
        for name, value in load_file(path).items()
    }
    assert any(".llama_model.model.layers.0.self_attn.q_proj." in name for name in renamed)
    assert any(".visual_encoder.blocks.0.attn.qkv." in name for name in renamed)
    outs = [tmp_path / "one", tmp_path / "other"]
    for out, tensors in zip(outs, (load_file(path), renamed), strict=True):
        save_file(tensors, path, {"format": "pt"})
        out.mkdir()
        merge_adapters(xraygpt, [adapter], out)
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    plain = load_file(merged / "model.safetensors")
    assert sum(not np.array_equal(one[name], plain[name]) for name in one) == 2 * 2 + 2 + 1


def test_features_are_those_of_the_published_formulas(
    xraygpt: Path, merged: Path, tmp_path: Path
) -> None:
    """The map puts every tensor where it means what it meant: nothing here knows the newest names."""
    export_model(merged, tmp_path, float_storage="float32")
    captioner = OrtCaptioner(tmp_path / "model", threads=1)
    published = load_file(xraygpt / "model.safetensors")
    noise = np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8)
    inputs = captioner.preparer.prepare([Image.fromarray(noise)], "Describe.")
    pixels = inputs.pixel_values[0].astype(np.float64)
    expected = image_features(published, pixels, tower_heads=3, heads=4)
    found = feature_rows(captioner.engine.features(inputs))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
