"""BiomedCLIPSeg: its names, which blocks its decoder reads, its masks, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.specs.biomedclipseg import biomedclipseg_config, mask_spec, states_spec
from exporter.families.task_models import biomedclipseg
from exporter.families.tasks import task_tensors
from exporter.graphs.export import export_model
from exporter.runtimes.graphs import OrtGraphs, TorchGraphs
from exporter.runtimes.tasks.segment import Segmenter
from tests.support.task_inputs import noise
from tests.support.tiny_biomedclipseg import EXTRACT, SIDE, plain_outputs, write_tiny_biomedclipseg

torch.set_num_threads(1)
LABELS = ("pleural effusion", "no stones in the gallbladder")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The published folder, the merged one, and its graphs in float32."""
    root = tmp_path_factory.mktemp("biomedclipseg")
    base, merged, out = write_tiny_biomedclipseg(root / "base"), root / "merged", root / "out"
    merged.mkdir()
    out.mkdir()
    merge_adapters(base, [], merged)
    export_model(merged, out, float_storage="float32")
    return base, merged, out / "model"


def test_names_of_the_published_size_are_those_of_the_network() -> None:
    from exporter.families.reference.biomedclipseg import BiomedCLIPSeg, BiomedCLIPSegConfig

    with torch.device("meta"):
        state = BiomedCLIPSeg(BiomedCLIPSegConfig()).state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    specs = task_tensors(biomedclipseg, {"model_type": "biomedclipseg"})
    assert {t.name: t.shape for t in specs} == expected
    # BiomedCLIP's two encoders without its pooler, and CLIPSeg rd64's decoder.
    assert sum(math.prod(s) for s in expected.values()) == 197_029_730


def test_the_decoder_reads_one_block_later_than_clipseg() -> None:
    spec = states_spec({"model_type": "biomedclipseg"})
    assert spec.read == (4, 7, 10)
    unused = {t.name for t in spec.tensors() if not t.used}
    assert "biomedclip.visual.trunk.blocks.11.mlp.fc1.weight" in unused
    assert "biomedclip.visual.trunk.blocks.10.mlp.fc1.weight" not in unused
    assert mask_spec({"model_type": "biomedclipseg"}).complex


def test_names_of_a_training_run_are_taken(built: tuple[Path, Path, Path]) -> None:
    base, merged, _ = built
    published = Checkpoint.open(base).tensors.keys()
    assert all(name.startswith("net.") for name in published)
    assert Checkpoint.open(merged).tensors.keys() == {n.removeprefix("net.") for n in published}
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["BiomedCLIPSeg"]
    assert biomedclipseg_config(config) == config


def test_masks_are_those_of_the_published_steps(built: tuple[Path, Path, Path]) -> None:
    base, merged, model = built
    ours, theirs = OrtGraphs(model, threads=1), TorchGraphs(merged, threads=1)
    outputs, picture = plain_outputs(base), noise(33, 80)
    texts = outputs("text_model", ours.preparer.texts(LABELS))
    states = outputs("vision_model", ours.preparer.images([picture]))
    expected = outputs("mask_decoder", {**states, **texts})["logits"]
    assert expected.shape == (2, SIDE, SIDE)
    for graphs in (ours, theirs):
        found = Segmenter(graphs).logits(picture, LABELS)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extract_layers": [*EXTRACT, 11]}, "expected different blocks of the tower's 11"),
        ({"conditional_layer": 3}, "conditional_layer is 3"),
        ({"reduce_dim": 62}, "reduce_dim 62"),
        ({"vision_config": {"num_attention_heads": 7}}, "7 heads"),
    ],
)
def test_configs_of_other_networks_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        biomedclipseg.graphs({"model_type": "biomedclipseg", **values})


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_biomedclipseg(tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": 32}))
    with pytest.raises(InputRefused, match=f"tower takes squares of {SIDE}"):
        biomedclipseg.open_preparer(folder)
