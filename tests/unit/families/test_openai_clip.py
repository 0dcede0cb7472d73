"""The original CLIP code's layout: cut, turned and renamed, there and back; sizes from shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.adapters.base import open_newest
from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.checkpoints import folder_config, modern_config, published_tensors
from exporter.families.layouts.openai_clip import openai_clip_sizes
from exporter.families.layouts.turned import TurnedCheckpoint
from exporter.families.task_models.clip import PUBLISHED
from tests.support.tiny_clip import (
    CONTEXT,
    PATCH,
    PROJECTION,
    SIDE,
    save_tensors,
    write_tiny_chexzero,
)

NAMES = PUBLISHED["chexzero"].names
# Of CLIP ViT-B/32 in the original code, as its README's model has them.
VIT_B32 = {
    "visual.conv1.weight": (768, 3, 32, 32),
    "visual.positional_embedding": (50, 768),
    "positional_embedding": (77, 512),
    "token_embedding.weight": (49408, 512),
    "text_projection": (512, 512),
    "visual.proj": (768, 512),
} | {
    f"{at}.{layer}.{name}": shape
    for at, width in (("visual.transformer.resblocks", 768), ("transformer.resblocks", 512))
    for layer in range(12)
    for name, shape in (
        ("attn.in_proj_weight", (3 * width, width)),
        ("mlp.c_fc.weight", (4 * width, width)),
    )
}


@pytest.fixture(scope="module")
def chexzero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chexzero(tmp_path_factory.mktemp("chexzero"))


@pytest.fixture(scope="module")
def merged(chexzero: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    merge_adapters(chexzero, [], out)
    return out


def test_a_checkpoint_comes_back_byte_for_byte(chexzero: Path, merged: Path) -> None:
    before, after = Checkpoint.open(chexzero), Checkpoint.open(merged)
    back = published_tensors({"model_type": "chexzero"}, after)
    assert {n: i.shape for n, i in back.tensors.items()} == {
        n: i.shape for n, i in before.tensors.items()
    }
    for name in before.tensors:
        assert np.array_equal(back.raw(name), before.raw(name)), name


def test_what_one_matrix_holds(chexzero: Path, merged: Path) -> None:
    """Queries, keys and values in this order, as torch's MultiheadAttention stacks them."""
    before, after = Checkpoint.open(chexzero), Checkpoint.open(merged)
    for at, new in (("visual.", "vision_model."), ("", "text_model.")):
        for kind in ("weight", "bias"):
            whole = before.raw(f"{at}transformer.resblocks.1.attn.in_proj_{kind}")
            stem = f"{new}encoder.layers.1.self_attn."
            parts = [after.raw(f"{stem}{part}_proj.{kind}") for part in "qkv"]
            assert np.array_equal(np.concatenate(parts), whole)
            assert len({part.tobytes() for part in parts}) == 3
    turned = after.raw("visual_projection.weight")
    assert np.array_equal(turned.T, before.raw("visual.proj"))
    assert np.array_equal(after.raw("text_projection.weight").T, before.raw("text_projection"))


def test_only_what_is_asked_for_is_read_newest(chexzero: Path) -> None:
    """Opened in place, without a copy on disk, as planning does."""
    newest, stored = open_newest(chexzero), Checkpoint.open(chexzero)
    assert newest.raw("logit_scale") == stored.raw("logit_scale")
    assert newest.info("visual_projection.weight").shape == (PROJECTION, 128)
    with pytest.raises(InputRefused):
        newest.raw("visual.proj")


def test_sizes_follow_from_the_shapes(chexzero: Path) -> None:
    config = folder_config(chexzero)
    vision, text = config["vision_config"], config["text_config"]
    assert config["model_type"] == "clip"
    assert config["architectures"] == ["CLIPModel"]
    assert config["projection_dim"] == PROJECTION
    assert (vision["image_size"], vision["patch_size"]) == (SIDE, PATCH)
    assert (vision["hidden_size"], vision["num_attention_heads"]) == (128, 2)
    assert (text["hidden_size"], text["num_attention_heads"]) == (64, 1)
    assert (vision["num_hidden_layers"], text["num_hidden_layers"]) == (2, 3)
    assert (text["max_position_embeddings"], text["eos_token_id"]) == (CONTEXT, 2)


def test_sizes_of_the_model_it_starts_from() -> None:
    found = openai_clip_sizes(VIT_B32)
    known = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    assert found["projection_dim"] == 512
    assert found["vision_config"] == {**known, "image_size": 224, "patch_size": 32}
    assert found["text_config"] == {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"visual.conv1.weight": None}, "not the original CLIP code's with a vision transformer"),
        ({"visual.conv1.weight": (768, 3, 32)}, "not the original CLIP code's"),
        ({"visual.conv1.weight": (768, 3, 32, 16)}, "expected 3 channels, square patches"),
        ({"visual.positional_embedding": (52, 768)}, "for 52 positions"),
        ({"positional_embedding": (77, 500)}, "500 channels; expected heads of 64"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Any], what: str) -> None:
    shapes = {n: s for n, s in {**VIT_B32, **change}.items() if s is not None}
    with pytest.raises(InputRefused) as caught:
        openai_clip_sizes(shapes)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_alone_has_no_sizes() -> None:
    with pytest.raises(InputRefused, match="has no sizes, which follow from the weights"):
        modern_config({"model_type": "chexzero"})


def test_a_pickle_is_refused_with_what_to_do(chexzero: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chexzero, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"visual.proj": torch.zeros(2, 2)}, folder / "best_64_5e-05_original.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputRefused, match=r"found 'best_64_5e-05_original\.pt'; expected safetensors"
    ):
        merge_adapters(folder, [], tmp_path / "out")
    # Under the right name it is still one.
    (folder / "best_64_5e-05_original.pt").rename(folder / "model.safetensors")
    with pytest.raises(InputRefused, match="a pickle .* convert it"):
        merge_adapters(folder, [], tmp_path / "out")


def test_an_uneven_matrix_is_refused(chexzero: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = shutil.copytree(chexzero, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.resblocks.0.attn.in_proj_weight"
    save_tensors(folder, {**tensors, name: tensors[name][:-1]})
    with pytest.raises(InputRefused, match="3 equal parts"):
        open_newest(folder)


def test_turned_is_its_own_inverse(chexzero: Path) -> None:
    stored = Checkpoint.open(chexzero)
    names = {"visual.proj": "a", "not.there": "b"}
    turned = TurnedCheckpoint(stored, names)
    assert "visual.proj" not in turned
    assert "b" not in turned
    assert np.array_equal(turned.raw("a"), stored.raw("visual.proj").T)
    assert turned.raw("a").flags.c_contiguous
    back = TurnedCheckpoint(turned, {"a": "visual.proj"})
    assert back.tensors == stored.tensors
    assert np.array_equal(back.raw("visual.proj"), stored.raw("visual.proj"))
    assert turned.same_bytes("a", "a")
    assert not turned.same_bytes("a", "text_projection")
    for wrong in ({"logit_scale": "a"}, {"visual.proj": "text_projection"}):
        with pytest.raises(InputRefused, match="expected a matrix"):
            TurnedCheckpoint(stored, wrong)


def test_the_merged_folder_says_everything(chexzero: Path, merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert {k: v for k, v in config.items() if k != "dtype"} == folder_config(chexzero)
    settings = json.loads((merged / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CheXzeroImageProcessor"
