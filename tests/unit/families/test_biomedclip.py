"""BiomedCLIP: open_clip's config and names, and the images as torchvision would cut them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.images.clip import read_clip_settings
from exporter.families.images.open_clip import PROCESSOR, read_open_clip_images
from exporter.families.layouts.biomedclip import (
    LEFT_OUT,
    biomedclip_config,
    check_open_clip,
)
from exporter.families.layouts.left_out import left_out, without
from exporter.families.task_models import biomedclip
from tests.support.tiny_biomedclip import write_tiny_biomedclip

SETTINGS = {"image_processor_type": PROCESSOR}
BARE = {"model_type": "biomedclip"}
# The published open_clip_config.json.
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


@pytest.mark.parametrize("extras", [False, True])
def test_exactly_the_listed_tensors_are_left(tmp_path, extras):
    folder = write_tiny_biomedclip(tmp_path, extras=extras)
    config = json.loads((folder / "config.json").read_text())
    stored = Checkpoint.open(folder)
    reasons = left_out(stored, LEFT_OUT)
    assert len(reasons) == (2 if extras else 0)
    buffers = {"text.transformer.embeddings.position_ids"} if extras else set()
    listed = {
        tensor.name: tensor.shape
        for spec in biomedclip.graphs(config).values()
        for tensor in spec.tensors()
    }
    kept = {n: info.shape for n, info in without(stored, reasons).tensors.items()}
    assert kept.keys() - listed.keys() == buffers
    assert {n: kept[n] for n in listed} == listed


def test_the_published_sizes_follow_from_the_type():
    image, text = biomedclip.image_spec(BARE), biomedclip.text_spec(BARE)
    assert (image.tower.layers, image.tower.hidden_size, image.rows) == (12, 768, 197)
    assert image.tower.norm_eps == 1e-6
    assert text.projections == (("text.proj.0.weight", 640), ("text.proj.2.weight", 512))
    assert text.bert.vocab_size == 30522
    assert biomedclip_config(biomedclip_config(BARE)) == biomedclip_config(BARE)


def write_open_clip(folder, part: str, **changed) -> None:
    """The published file with some keys of one of its parts changed."""
    published = copy.deepcopy(OPEN_CLIP)
    model = published["model_cfg"]
    {"model_cfg": model, "preprocess_cfg": published["preprocess_cfg"], **model}[part].update(
        changed
    )
    (folder / "open_clip_config.json").write_text(json.dumps(published))


def test_the_published_config_fits(tmp_path):
    check_open_clip(tmp_path, BARE)  # nothing to compare
    write_open_clip(tmp_path, "vision_cfg")
    check_open_clip(tmp_path, BARE)


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("model_cfg", {"embed_dim": 256}),
        ("vision_cfg", {"timm_model_name": "vit_large_patch16_224"}),
        ("vision_cfg", {"timm_pool": "avg"}),
        ("vision_cfg", {"timm_proj": "mlp"}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"hf_pooler_type": "cls_pooler"}),
        ("text_cfg", {"hf_proj_type": "linear"}),
        ("text_cfg", {"context_length": 77}),
        ("preprocess_cfg", {"mean": [0.5, 0.5, 0.5]}),
        ("preprocess_cfg", {"resize_mode": "squash"}),
    ],
)
def test_another_open_clip_model_is_refused(tmp_path, part, changed):
    write_open_clip(tmp_path, part, **changed)
    (key,) = changed
    with pytest.raises(InputRefused, match=f"{key} is") as caught:
        check_open_clip(tmp_path, BARE)
    assert "\n" not in str(caught.value)


def test_the_crop_begins_where_torchvision_rounds_to():
    """At a difference of 3 pixels torchvision takes 2 from the left, transformers' CLIP 1."""
    settings = read_open_clip_images(SETTINGS, "here", 32)
    ramp = np.tile(np.arange(35, dtype=np.uint8) * 7, (32, 1))
    found = settings.pixels(Image.fromarray(ramp))
    level = (ramp[0, 2] / 255 - 0.48145466) / 0.26862954
    assert found[0, 0, 0] == pytest.approx(level, abs=1e-6)
    clip = read_clip_settings({}, "here").normalisation
    np.testing.assert_array_equal(settings.normalisation.mean, clip.mean)


@pytest.mark.parametrize(
    "raw",
    [{}, {"image_processor_type": "CLIPImageProcessor"}, {**SETTINGS, "image_std": [1, 0, 1]}],
)
def test_other_image_settings_are_refused(raw):
    with pytest.raises(InputRefused, match="bad image settings") as caught:
        read_open_clip_images(raw, "here", 224)
    assert "\n" not in str(caught.value)


def test_a_strip_is_refused():
    with pytest.raises(InputRefused, match="would become 224 x"):
        read_open_clip_images(SETTINGS, "here", 224).pixels(Image.new("L", (9000, 1)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_config": {"num_attention_heads": 7}}, "7 heads"),
        ({"vision_config": {"patch_size": 15}}, "patches of 15"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act"),
        ({"text_config": {"hidden_size": 100}}, "text_config has hidden size 100"),
        ({"vision_config": "x"}, "vision_config is 'x'"),
        ({"projection_dim": 0}, "projection_dim is 0"),
    ],
)
def test_bad_configs_are_refused_in_one_line(changed, words):
    with pytest.raises(InputRefused, match=words) as caught:
        biomedclip.graphs({**BARE, **changed})
    assert "\n" not in str(caught.value)
