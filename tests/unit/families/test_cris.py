"""CRIS: its names, the kernel made of the text, its padding, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.families.specs.cris import cris_config, cris_sizes
from exporter.families.task_models import cris
from exporter.families.tasks import MASK_GRAPH, TEXT_GRAPH, task_tensors
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.graphs import OrtGraphs, TorchGraphs
from exporter.runtimes.tasks.segment import Segmenter
from tests.support.plain_cris import plain_cris
from tests.support.task_inputs import noise
from tests.support.tiny_cris import SIDE, WORDS, write_tiny_cris

torch.set_num_threads(1)
LABELS = ("left pleural effusion", "ct", "a 19 mm lesion in the right lobe of the liver")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The published folder, the merged one, and its graphs in float32."""
    root = tmp_path_factory.mktemp("cris")
    base, merged, out = write_tiny_cris(root / "base"), root / "merged", root / "out"
    merged.mkdir()
    out.mkdir()
    merge_adapters(base, [], merged)
    export_model(merged, out, float_storage="float32")
    return base, merged, out / "model"


def test_names_of_the_published_size_are_those_of_the_network() -> None:
    from exporter.families.reference.cris import CRIS, CRISConfig

    with torch.device("meta"):
        state = CRIS(CRISConfig()).state_dict()
    expected = {n: tuple(v.shape) for n, v in state.items() if "num_batches" not in n}
    assert {t.name: t.shape for t in task_tensors(cris, {"model_type": "cris"})} == expected
    # The kernel is made for a quarter of the decoder's resolution, of half of its channels.
    assert expected["proj.txt.weight"] == (256 * 9 + 1, 1024)
    assert expected["backbone.visual.attnpool.positional_embedding"] == (50, 2048)


def test_masks_are_those_of_the_published_forward(built: tuple[Path, Path, Path]) -> None:
    """An image for each text there, one image for all texts here."""
    base, merged, model = built
    plain, picture = plain_cris(base), noise(70, 41)
    ours, theirs = OrtGraphs(model, threads=1), TorchGraphs(merged, threads=1)
    ids = torch.from_numpy(theirs.preparer.texts(LABELS)["input_ids"])
    pixels = torch.from_numpy(theirs.preparer.images([picture])["pixel_values"])
    with torch.inference_mode():
        texts = plain.text(ids)
        expected = plain.mask(plain.image(pixels), *texts.values()).numpy()
        whole = theirs.model(pixels.expand(len(LABELS), -1, -1, -1), ids).numpy()
    assert expected.shape == (len(LABELS), SIDE // 4, SIDE // 4)
    assert np.abs(whole - expected).max() < 1e-4 * np.abs(expected).max()
    for graphs in (ours, theirs):
        found = Segmenter(graphs).logits(picture, LABELS)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_any_number_of_texts_has_its_own_kernels(built: tuple[Path, Path, Path]) -> None:
    segmenter = Segmenter(OrtGraphs(built[2], threads=1))
    picture = noise(50, 70)
    together = segmenter.logits(picture, LABELS)
    for place, label in enumerate(LABELS):
        alone = segmenter.logits(picture, [label])[0]
        np.testing.assert_allclose(together[place], alone, atol=1e-4 * np.abs(alone).max())


def test_padding_is_not_seen(built: tuple[Path, Path, Path]) -> None:
    """Words behind the end token may be anything, as far as the mask hides them."""
    graphs = OrtGraphs(built[2], threads=1)
    feed = next(
        iter(cris.graphs(cris_of(built[1]))[MASK_GRAPH].example_feeds(np.random.default_rng(0)))
    )
    changed = {**feed, "words": feed["words"].copy()}
    changed["words"][0, feed["word_mask"][0] == 0] = 5.0
    found, expected = (graphs.run(MASK_GRAPH, f)["logits"] for f in (changed, feed))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    seen = {**changed, "word_mask": np.ones_like(feed["word_mask"])}
    assert np.abs(graphs.run(MASK_GRAPH, seen)["logits"] - expected).max() > 0.1


def cris_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_texts_have_one_length(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    preparer = OrtGraphs(built[2], threads=1).preparer
    ids = preparer.texts(["CT", "word " * 40])["input_ids"]
    assert ids.shape == (2, WORDS)
    end = ids.max()
    assert ids[1, -1] == end
    assert (ids[0] == 0).sum() > 0
    # Padded with the end token, as medvlsm does: its place is still the first, and all is seen.
    folder = write_tiny_cris(tmp_path, pad_token_id=int(end))
    padded = cris.open_preparer(folder).texts(["CT"])["input_ids"]
    assert (padded[0, (ids[0] != 0).sum() :] == end).all()
    found = OrtGraphs(built[2], threads=1).run(TEXT_GRAPH, {"input_ids": padded})
    np.testing.assert_array_equal(found["word_mask"], 1)
    plain = OrtGraphs(built[2], threads=1).run(TEXT_GRAPH, {"input_ids": ids[:1]})
    np.testing.assert_allclose(found["text_embeds"], plain["text_embeds"], atol=1e-4)


def test_layers_of_pixels_and_words_are_quantized(
    built: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    report = quantize_model(built[1], tmp_path, find_scheme("int8"), threads=1)
    names = {layer.plan.name for layer in report.layers}
    assert "decoder.layers.0.multihead_attn.in_proj_weight" in names
    assert "backbone.text_projection" in names
    assert "backbone.visual.attnpool.c_proj.weight" in names
    reasons = {f.name: f.reason for f in report.floats}
    assert "convolution" in reasons["backbone.visual.layer1.0.conv2.weight"]
    assert "batch norm" in reasons["neck.aggr.1.running_var"]


@pytest.mark.parametrize("scheme", ["int4-rtn", "bnb-nf4", "bnb-int8"])
def test_parts_of_one_matrix_are_taken_apart_in_every_form(
    built: tuple[Path, Path, Path], tmp_path: Path, scheme: str
) -> None:
    """Queries, keys and values are rows of one stored matrix, and see other inputs."""
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    quantized.mkdir()
    out.mkdir()
    quantize_model(built[1], quantized, find_scheme(scheme), threads=1)
    export_model(quantized, out)
    picture = noise(64, 64)
    found, expected = (
        Segmenter(g).logits(picture, LABELS)
        for g in (OrtGraphs(out / "model", threads=1), TorchGraphs(quantized, threads=1))
    )
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": 400}, "images of 400 .*multiples of 32"),
        ({"word_len": 99}, "texts of 99 tokens in 77"),
        ({"fpn_out": [256, 500, 1024]}, "pixels and words of one width"),
        ({"num_head": 3}, "heads 3 and 8"),
        ({"vision_layers": [3, 4, 6]}, r"vision_layers is \[3, 4, 6\]; expected 4"),
        ({"vision_layers": "RN50"}, "vision_layers is 'RN50'"),
    ],
)
def test_configs_of_other_networks_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        cris_sizes(values)


def test_a_merged_folder_says_every_size(built: tuple[Path, Path, Path]) -> None:
    assert cris_config({"model_type": "cris"})["vision_layers"] == [3, 4, 6, 3]
    merged = cris_of(built[1])
    assert merged["architectures"] == ["CRIS"]
    assert cris_config(merged) == merged


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_cris(tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": 64}))
    with pytest.raises(InputRefused, match="config.json's input_size is 96"):
        cris.open_preparer(folder)
