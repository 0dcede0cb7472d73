"""What a merge of a model without captions is proven on: every graph's outputs, each on its own scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.adapters.probes import agreement, difference, probe_for
from exporter.adapters.prove import prove_logits
from exporter.core.errors import ParityFailed
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH
from exporter.runtimes.torch_reference import load_model
from tests.support.task_adapters import write_task_adapter
from tests.support.tiny_clip import write_tiny_clip

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def model_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return load_model(folder, config), config


def test_every_graph_is_probed_at_two_shapes(base: Path) -> None:
    model, config = model_of(base)
    probe = probe_for(config, 0)
    found = probe.run(model)
    assert probe.kind == "outputs"
    assert probe.tiles == 3
    names = sorted(name.partition(".")[0] + "." + name.rpartition(".")[2] for name in found)
    assert names == sorted(
        2
        * [f"{VISION_GRAPH}.image_embeds", f"{TEXT_GRAPH}.text_embeds", f"{TEXT_GRAPH}.logit_scale"]
    )
    again, other = probe_for(config, 0).run(model), probe_for(config, 1).run(model)
    assert difference(again, found) == 0
    assert difference(other, found) > 0.1


@pytest.mark.parametrize("part", ["text_model", "vision_model"])
def test_a_change_in_one_half_is_seen(base: Path, part: str) -> None:
    model, config = model_of(base)
    probe = probe_for(config, 0)
    before = probe.run(model)
    with torch.no_grad():
        dict(model.named_parameters())[f"{part}.encoder.layers.1.mlp.fc2.weight"].mul_(1.5)
    after = probe.run(model)
    moved = {name for name, values in before.items() if not np.array_equal(values, after[name])}
    assert {name.partition(".")[0] for name in moved} == {part}
    assert difference(after, before) > 1e-3


def test_an_output_is_measured_on_its_own_scale() -> None:
    theirs = {"large": np.array([1000.0, 0.0]), "small": np.array([0.01, 0.02])}
    ours = {"large": np.array([1001.0, 0.0]), "small": np.array([0.01, 0.01])}
    assert difference(ours, theirs) == pytest.approx(0.5)
    assert agreement(ours, theirs) is None
    logits = {"logits": np.array([[1.0, 2.0], [2.0, 1.0]])}
    assert agreement({"logits": np.array([[1.0, 2.0], [1.0, 2.0]])}, logits) == 0.5


def test_another_merge_is_not_proven(base: Path, tmp_path: Path) -> None:
    """One value changed in the weights, and equal weights behind another config.json."""
    adapter, out = write_task_adapter(base, tmp_path / "a", ["q_proj", "v_proj"]), tmp_path / "out"
    out.mkdir()
    merge_adapters(base, [adapter], out)
    proof = prove_logits(base, [adapter], out)
    assert proof.method == "outputs"
    assert proof.logit_error is not None
    assert proof.tolerance is not None
    assert proof.logit_error <= proof.tolerance < 0.02
    assert proof.weight_steps <= 0.51
    path, tensors = out / "config.json", load_file(out / "model.safetensors")
    kept = path.read_text()
    config = json.loads(kept)
    config["text_config"]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    with pytest.raises(ParityFailed, match="merged outputs differ from the adapter's"):
        prove_logits(base, [adapter], out)
    path.write_text(kept)
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    tensors[name][0, 0] += 0.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParityFailed, match="float16 steps from peft's merge"):
        prove_logits(base, [adapter], out)
