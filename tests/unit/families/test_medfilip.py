"""MedFILIP: the published code's names, its image settings, and what it is built of."""

from __future__ import annotations

import json

import pytest
from transformers import ResNetConfig, ResNetModel

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS
from exporter.families.layouts.medfilip import medfilip_config
from exporter.families.task_models import medfilip
from tests.support.tiny_medfilip import IMAGES, published_resnet, write_tiny_medfilip

BARE = {"model_type": "medfilip"}


def test_exactly_the_published_tensors_are_listed(tmp_path):
    folder = write_tiny_medfilip(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    listed = {
        tensor.name: tensor.shape
        for spec in medfilip.graphs(config).values()
        for tensor in spec.tensors()
    }
    stored = {n: info.shape for n, info in Checkpoint.open(folder).tensors.items()}
    assert all(BUFFERS.search(name) for name in stored.keys() - listed.keys())
    assert {n: stored[n] for n in listed} == listed


def test_the_published_sizes_follow_from_the_type():
    """Names and shapes of resnet50, of transformers' own class by torchvision's names."""
    image, text = medfilip.image_spec(BARE), medfilip.text_spec(BARE)
    assert (image.image_size, image.channels, image.output_size) == (448, 2048, 768)
    assert (text.hidden_size, text.output_size, text.end) == (512, 768, None)
    expected = {
        f"image_model.{name}": tuple(values.shape)
        for name, values in published_resnet(ResNetModel(ResNetConfig()))
        if not name.endswith("num_batches_tracked")
    }
    expected |= {"image_model.fc.weight": (768, 2048), "image_model.fc.bias": (768,)}
    assert {tensor.name: tensor.shape for tensor in image.tensors()} == expected
    assert medfilip_config(medfilip_config(BARE)) == medfilip_config(BARE)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "KeyError: 'image_mean'"),
        ({"image_mean": 0.5}, "KeyError: 'image_std'"),
        ({**IMAGES, "image_std": 0}, "image_std 0.0"),
        ({**IMAGES, "image_mean": [0.5] * 3}, "TypeError"),
        ({**IMAGES, "image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor'"),
    ],
)
def test_settings_without_its_training_set_are_refused(tmp_path, raw, words):
    folder = write_tiny_medfilip(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(InputRefused, match=words) as caught:
        medfilip.open_preparer(folder)
    assert "expected image_mean and image_std" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_config": {"model_type": "eva02"}}, "model_type is 'eva02'; expected resnet"),
        ({"vision_config": {"depths": []}}, r"depths is \[\]"),
        ({"vision_config": {"image_size": -1}}, "image_size is -1"),
        ({"projection_dim": 1.5}, "projection_dim is 1.5"),
        ({"text_config": {"num_attention_heads": 7}}, "7 heads"),
    ],
)
def test_other_models_are_refused_in_one_line(changed, words):
    with pytest.raises(InputRefused, match=words) as caught:
        medfilip.graphs({**BARE, **changed})
    assert "\n" not in str(caught.value)
