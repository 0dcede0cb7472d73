"""Shapes of models with convolutions, against their torch classes at full size on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exporter.catalog.profiles import find_model
from exporter.core.errors import InputRefused
from exporter.families.captioners import cnn_transformer
from exporter.families.checkpoints import modern_config
from exporter.families.shapes.find import shape_of, shape_of_config
from exporter.families.shapes.parts import ModelShape, Part
from exporter.families.table import TASK_FAMILIES, config_defaults, family_of, task_family_of
from exporter.families.tasks import task_tensors
from exporter.families.torch_classes import torch_class
from exporter.pipeline.fit_sizes import text_operations, tower_operations

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

CONFIGS: dict[str, dict[str, Any]] = {
    "cris": {"model_type": "cris"},
    "medfilip": {"model_type": "medfilip"},
    "medclip": {"model_type": "medclip", "vision_config": {"model_type": "resnet"}},
    "cnn_transformer": {"model_type": "cnn_transformer"},
}
# Published: torchvision's classifiers, and CLIP RN50 without its ResNet. Trained values alone.
RESNET_50, DENSENET_121 = 25557032, 7978856
CLIP_RN50_TEXT = 102007137 - 38316896


def shape(family: str, **changed: Any) -> ModelShape:
    """The shape of a bare config.json."""
    config = modern_config({**CONFIGS[family], **changed})
    return shape_of_config(family, family, config, {})


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    """The family's torch class at full size, without values."""
    made: dict[str, Any] = {}

    def build(family: str) -> Any:
        if family not in made:
            config = modern_config(CONFIGS[family])
            kind = torch_class(config)
            with torch.device("meta"):
                made[family] = kind(kind.config_class(**config)).eval()
        return made[family]

    return build


def trained(found: ModelShape, part: Part) -> int:
    """Parameters without means and variances."""
    norms = sum(
        w.rows * w.count
        for w in found.weights
        if w.part == part and w.role == "float" and w.columns == 4
    )
    return sum(w.parameters for w in found.weights if w.part == part) - 2 * norms


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_parameters_are_those_of_the_torch_class(family, models):
    state = models(family).state_dict()
    stored = sum(v.numel() for n, v in state.items() if not n.endswith("num_batches_tracked"))
    assert shape(family).parameters == stored


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_parameters_are_those_that_the_family_lists(family):
    config = modern_config(CONFIGS[family])
    task = task_family_of(config)
    if task is not None:
        tensors = task_tensors(task, config)
    else:
        captioner = family_of(config)
        tensors = (
            *captioner.decoder_spec(config).tensors(),
            *captioner.tower_spec(config).tensors(),
        )
    assert shape(family).parameters == sum(math.prod(t.shape) for t in tensors)


def test_published_counts_of_the_networks_inside():
    assert trained(shape("medfilip"), "vision") == RESNET_50 - 2049 * 1000 + 2049 * 768
    assert trained(shape("medclip"), "vision") == RESNET_50 - 2049 * 1000 + 2048 * 512
    convolved = [w for w in shape("cnn_transformer").weights if w.convolution or w.columns == 4]
    statistics = sum(2 * w.rows for w in convolved if w.columns == 4)
    assert sum(w.parameters for w in convolved) - statistics == DENSENET_121 - 1025 * 1000
    words = [w for w in shape("cris").weights if w.part == "text"]
    # The mask's graph has two layers more that see the text alone.
    mask = 1024 * 1024 + (256 * 9 + 1) * (1024 + 1)
    assert sum(w.parameters for w in words) - mask == CLIP_RN50_TEXT


def counted(run: Callable[[], Any]) -> int:
    """Operations of matrix products, convolutions and attention; a multiply-add is two."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def image(side: int) -> Any:
    """One image without values."""
    return torch.zeros(1, 3, side, side, device="meta")


@pytest.mark.parametrize("family", ["medfilip", "medclip"])
def test_operations_of_a_resnet(family, models):
    found, model = shape(family), models(family)
    tower = model.image_model if family == "medfilip" else model.encode_image
    assert found.tower is not None
    operations = counted(lambda: tower(image(found.tower.side)))
    assert tower_operations(found) == pytest.approx(operations, rel=1e-3)


def test_operations_of_the_densenet_and_its_encoder(models):
    found = shape("cnn_transformer")
    operations = counted(lambda: models("cnn_transformer").encode(image(224)))
    assert tower_operations(found) == pytest.approx(operations, rel=5e-3)


def test_operations_of_all_graphs_of_cris(models):
    found, model = shape("cris"), models("cris")
    ids = torch.ones(1, 17, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        vision = counted(lambda: model.levels(image(416)))
        words = counted(lambda: model.texts(ids))
        masks = counted(lambda: model.masks(model.levels(image(416)), *model.texts(ids)))
    # `masks` ran the other two again. The kernel made of the text is no weight: 0.1 per cent.
    assert tower_operations(found) + text_operations(found) == pytest.approx(masks, rel=5e-3)
    layers = 12 * (12 * 512**2 * 2 * 17 + 4 * 17**2 * 512)
    assert words == pytest.approx(layers, rel=0.01)
    assert vision < tower_operations(found)


def test_feature_maps_by_hand():
    """The largest: behind ResNet-50's first projected block, 256 channels twice beside 64."""
    tower = shape("medfilip").tower
    assert tower is not None
    assert tower.maps == (64 + 2 * 256) * 112**2
    assert (tower.sequence, tower.attended) == (14**2, ())
    small = shape("medclip").tower
    assert small is not None
    assert small.maps * 4 == (64 + 2 * 256) * 112**2
    cells = shape("cnn_transformer").tower
    assert cells is not None
    # The last layer of the first block: 224 channels, as many normed, and 128 of the bottleneck.
    assert cells.maps == (2 * 224 + 128) * 56**2
    masks = shape("cris").tower
    assert masks is not None
    assert masks.maps == (64 + 2 * 256) * 104**2 + (512 + 256) * 104**2
    assert masks.attended == (169, 676, 17, 676, 17, 676, 17)


def test_a_config_that_says_its_sizes_is_followed():
    sizes = {"growth_rate": 16, "block_config": [2, 3], "hidden_size": 64, "vocab_size": 100}
    found = shape("cnn_transformer", **sizes)
    config = modern_config({**CONFIGS["cnn_transformer"], **sizes})
    tensors = (
        *cnn_transformer.decoder_spec(config).tensors(),
        *cnn_transformer.tower_spec(config).tensors(),
    )
    assert found.parameters == sum(math.prod(t.shape) for t in tensors)
    odd = {"vision_config": {"image_size": 90, "depths": [1, 2], "embedding_size": 24}}
    config = modern_config({"model_type": "medfilip", **odd})
    listed = task_tensors(TASK_FAMILIES["medfilip"], config)
    assert shape("medfilip", **odd).parameters == sum(math.prod(t.shape) for t in listed)


@pytest.mark.parametrize("name", ["cris", "medfilip", "cnn-transformer"])
def test_a_profile_has_the_sizes_of_a_bare_config(name):
    family = name.replace("-", "_")
    assert shape_of(find_model(name)) == shape(family)


def test_each_tower_of_medclip_has_its_own_depths():
    bare = shape_of_config("x", "medclip", modern_config({"model_type": "medclip"}), {})
    assert bare == shape_of(find_model("medclip"))
    assert len(bare.tower.attended) == 12
    assert sum(w.count for w in shape("medclip").weights if w.convolution) == 53


@pytest.mark.parametrize("family", ["cris", "cnn_transformer"])
def test_defaults_are_those_of_the_config_class(family, models):
    config = type(models(family).config)().to_dict()
    for key, value in config_defaults(family).items():
        found = config[key]
        assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_defaults_of_medfilip_are_those_of_the_networks_inside():
    from transformers import CLIPTextConfig, ResNetConfig

    text, vision = CLIPTextConfig().to_dict(), ResNetConfig().to_dict()
    for key, value in config_defaults("medfilip").items():
        section, _, leaf = key.rpartition(".")
        if section == "text_config":
            assert text[leaf] == value, key
        if leaf in ("depths", "embedding_size"):
            assert tuple(np.atleast_1d(vision[leaf])) == tuple(np.atleast_1d(value)), key


@pytest.mark.parametrize("bad", [[], [3, 0], ["a"], 5, [3, True]])
def test_depths_that_are_none_are_refused(bad):
    config = {"model_type": "medfilip", "vision_config": {"depths": bad}}
    with pytest.raises(
        InputRefused, match=r"vision_config\.depths is .*positive integers"
    ) as caught:
        shape_of_config("x", "medfilip", config, {})
    assert "\n" not in str(caught.value)
