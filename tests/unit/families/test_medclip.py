"""MedCLIP: the published code's names and images, and what it is built of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS
from exporter.families.images.medclip import read_medclip_images
from exporter.families.layouts.bert import POOLER
from exporter.families.layouts.left_out import left_out, without
from exporter.families.layouts.medclip import IMAGES, LEFT_OUT, OLD_NAMES, medclip_config
from exporter.families.layouts.names import NameMap
from exporter.families.specs.swin import INDEX
from exporter.families.task_models import medclip
from tests.support.tiny_medclip import LAYERS, write_tiny_medclip

BARE = {"model_type": "medclip"}


@pytest.mark.parametrize("resnet", [False, True])
def test_published_names_and_back(tmp_path, resnet):
    names, folder = NameMap(OLD_NAMES), write_tiny_medclip(tmp_path, resnet=resnet)
    config = json.loads((folder / "config.json").read_text())
    stored = Checkpoint.open(folder)
    found = stored.renamed(names.newest)
    assert found.renamed(names.published).tensors.keys() == stored.tensors.keys()
    reasons = left_out(found, LEFT_OUT)
    assert set(reasons.values()) == ({POOLER} if resnet else {POOLER, INDEX})
    listed = {
        tensor.name: tensor.shape
        for spec in medclip.graphs(config).values()
        for tensor in spec.tensors()
    }
    kept = {n: info.shape for n, info in without(found, reasons).tensors.items()}
    assert all(BUFFERS.search(name) for name in kept.keys() - listed.keys())
    assert {n: kept[n] for n in listed} == listed


def test_the_published_sizes_follow_from_the_type():
    image, text = medclip.image_spec(BARE), medclip.text_spec(BARE)
    assert (image.tower.output_size, image.output_size) == (768, 512)
    assert text.averaged == (1, 2, 12)
    assert text.bert.vocab_size == 28996
    assert medclip_config(medclip_config(BARE)) == medclip_config(BARE)


def test_the_states_that_are_averaged_end_with_the_last(tmp_path):
    config = json.loads((write_tiny_medclip(tmp_path) / "config.json").read_text())
    assert medclip.text_spec(config).averaged == (1, 2, LAYERS)


def test_an_image_is_padded_with_black_and_never_below_the_tower():
    settings = read_medclip_images(IMAGES, "here", 32)
    black = (0 - IMAGES["image_mean"]) / IMAGES["image_std"]
    white = (1 - IMAGES["image_mean"]) / IMAGES["image_std"]
    found = settings.pixels(Image.new("L", (10, 20), 255))
    assert found.shape == (3, 32, 32)
    # 10 x 20 in the middle of 32 x 32: no pixel is made larger.
    expected = np.full((32, 32), black, np.float32)
    expected[6:26, 11:21] = white
    for channel in found:
        np.testing.assert_allclose(channel, expected, atol=1e-6)


@pytest.mark.parametrize(
    "raw",
    [{}, {**IMAGES, "image_std": 0}, {**IMAGES, "image_mean": "x"}, {**IMAGES, "image_mean": None}],
)
def test_other_image_settings_are_refused(raw):
    with pytest.raises(InputRefused, match="bad image settings") as caught:
        read_medclip_images(raw, "here", 224)
    assert "\n" not in str(caught.value)


def test_an_image_whose_square_explodes_is_refused():
    with pytest.raises(InputRefused, match="would be padded to 9000 x 9000"):
        read_medclip_images(IMAGES, "here", 224).pixels(Image.new("L", (9000, 1)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_config": {"model_type": "vit"}}, "model_type is 'vit'; expected swin or resnet"),
        ({"vision_config": {"model_type": "resnet", "depths": [3, "4"]}}, "depths is"),
        ({"vision_config": {"image_size": 250}}, "expected whole windows"),
        ({"text_config": {"num_hidden_layers": 1}}, "two or more"),
        ({"projection_dim": "512"}, "projection_dim is '512'"),
    ],
)
def test_other_models_are_refused_in_one_line(changed, words):
    with pytest.raises(InputRefused, match=words) as caught:
        medclip.graphs({**BARE, **changed})
    assert "\n" not in str(caught.value)
