"""CLIPSeg: its names and shapes, its graphs against transformers, and masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.adapters.merge import merge_adapters
from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.families.specs.clipseg import mask_spec, states_spec, text_spec
from exporter.families.task_models import clipseg
from exporter.families.tasks import VISION_GRAPH, task_tensors
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.graphs import OrtGraphs, TorchGraphs
from exporter.runtimes.tasks.segment import Segmenter, resized
from tests.support.task_inputs import noise
from tests.support.tiny_clipseg import PATCH, SIDE, TOWER, write_tiny_clipseg

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")
LABELS = ("pleural effusion", "a heart", "no pneumothorax of the left lung")
# Both convolutions, and the text's factors before the first block and before a later one.
KINDS: dict[str, dict[str, Any]] = {
    "complex": {},
    "simple": {
        "use_complex_transposed_convolution": False,
        "conditional_layer": 1,
        "extract_layers": [3, 1],
        "legacy": False,
    },
}


def exported(source: Path, out: Path, **options: Any) -> Path:
    out.mkdir()
    export_model(source, out, **options)
    return out / "model"


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A merged folder, and its graphs in float32."""
    folder = tmp_path_factory.mktemp("clipseg")
    base, merged = write_tiny_clipseg(folder / "base", **KINDS[request.param]), folder / "merged"
    merged.mkdir()
    merge_adapters(base, [], merged)
    return merged, exported(merged, folder / "out", float_storage="float32")


def library_logits(theirs: TorchGraphs, size: tuple[int, int]) -> NDArray[np.float32]:
    """What the whole model of transformers gives: an image for each text."""
    images = [noise(*size)] * len(LABELS)
    feed = {**theirs.preparer.images(images), **theirs.preparer.texts(LABELS)}
    with torch.inference_mode():
        out = theirs.model(**{name: torch.from_numpy(array) for name, array in feed.items()})
    logits: NDArray[np.float32] = out.logits.numpy()
    return logits


def test_names_and_shapes_of_the_published_size_are_those_of_the_real_class() -> None:
    profile = find_model("clipseg")
    config: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    with torch.device("meta"):
        kind = transformers.CLIPSegForImageSegmentation
        model = kind(transformers.CLIPSegConfig(**config))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    specs = task_tensors(clipseg, config)
    assert {s.name: s.shape for s in specs} == expected
    assert sum(math.prod(s) for s in expected.values()) == profile.facts.parameters


def test_masks_are_those_of_the_whole_model(pair: tuple[Path, Path]) -> None:
    merged, model = pair
    ours, theirs = OrtGraphs(model, threads=1), TorchGraphs(merged, threads=1)
    for size in ((97, 31), (SIDE, SIDE)):
        expected = library_logits(theirs, size)
        assert np.ptp(expected) > 0.1
        for graphs in (ours, theirs):
            found = Segmenter(graphs).logits(noise(*size), LABELS)
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        masks = Segmenter(ours).masks(noise(*size), LABELS)
        np.testing.assert_allclose(masks, 1 / (1 + np.exp(-expected.astype("f8"))), atol=1e-5)


def test_a_label_does_not_depend_on_the_others(pair: tuple[Path, Path]) -> None:
    segmenter = Segmenter(OrtGraphs(pair[1], threads=1))
    picture = noise(50, 70)
    together = segmenter.logits(picture, LABELS)
    for place, label in enumerate(LABELS):
        alone = segmenter.logits(picture, [label])
        np.testing.assert_allclose(together[place], alone[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("side", [TOWER, TOWER - PATCH, SIDE, 2 * SIDE])
def test_positions_are_interpolated_as_in_transformers(pair: tuple[Path, Path], side: int) -> None:
    """At the tower's own size, below and above."""
    merged, model = pair
    pixels = np.random.default_rng(side).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    feed = {"pixel_values": pixels}
    found = OrtGraphs(model, threads=1).run(VISION_GRAPH, feed)
    for name, values in TorchGraphs(merged, threads=1).run(VISION_GRAPH, feed).items():
        assert found[name].shape == (1, (side // PATCH) ** 2 + 1, 64)
        assert np.abs(found[name] - values).max() < 1e-4 * np.abs(values).max()


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.01), ("int4-rtn", 0.1)])
def test_quantized_masks_stay_near(
    pair: tuple[Path, Path], tmp_path: Path, scheme: str, bound: float
) -> None:
    """The mean change of a pixel's probability on random weights is below `bound`; what passes through
    few weights is kept in float, with a reason.
    """
    merged, model = pair
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    report = quantize_model(merged, quantized, find_scheme(scheme), threads=1)
    reasons = {f.name: f.reason for f in report.floats}
    assert "few bytes" in reasons["decoder.film_mul.weight"]
    assert "few bytes" in reasons["decoder.reduces.0.weight"]
    assert "decoder.layers.0.mlp.fc1.weight" in {layer.plan.name for layer in report.layers}
    graphs = OrtGraphs(exported(quantized, tmp_path / "out"), threads=1)
    found, expected = (
        Segmenter(g).masks(noise(40, 60), LABELS) for g in (graphs, OrtGraphs(model, threads=1))
    )
    assert 0 < np.abs(found - expected).mean() < bound


def test_unused_parts_are_named(pair: tuple[Path, Path]) -> None:
    report = json.loads((pair[1].parent / "export.json").read_text())
    assert "clip.visual_projection.weight" in report["unused"]
    assert "clip.vision_model.encoder.layers.4.mlp.fc1.weight" in report["unused"]


def test_masks_at_the_image_size() -> None:
    mask = np.zeros((4, 4), np.float32)
    mask[:, 2:] = 1
    found = resized(mask, (8, 6))
    assert found.shape == (6, 8)
    np.testing.assert_allclose(found[:, [0, 1, 6, 7]], [[0, 0, 1, 1]] * 6, atol=1e-6)


def test_labels_are_needed(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputRefused, match="no label was given"):
        Segmenter(OrtGraphs(pair[1], threads=1)).masks(noise(20, 20), [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extract_layers": [3, 12]}, r"extract_layers is \[3, 12\]; expected different blocks"),
        ({"extract_layers": [3, 3]}, "expected different blocks of the tower's 12"),
        ({"extract_layers": "all"}, "extract_layers is 'all'"),
        ({"conditional_layer": 3}, "conditional_layer is 3; expected one of the decoder's 3"),
        ({"reduce_dim": 62}, "reduce_dim 62, 4 decoder heads"),
        ({"vision_config": {"num_channels": 1}}, "1 channels"),
    ],
)
def test_configs_of_other_networks_are_refused(values: dict[str, Any], message: str) -> None:
    config = {"text_config": {}, "vision_config": {}, **values}
    with pytest.raises(InputRefused, match=message):
        [read(config) for read in (states_spec, text_spec, mask_spec)]


@pytest.mark.parametrize(
    ("size", "message"),
    [(40, "images become \\(40, 40\\)"), ({"height": 64, "width": 32}, "squares of whole patches")],
)
def test_settings_that_no_mask_can_have_are_refused(
    tmp_path: Path, size: object, message: str
) -> None:
    folder = write_tiny_clipseg(tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": size}))
    with pytest.raises(InputRefused, match=message):
        clipseg.open_preparer(folder)
