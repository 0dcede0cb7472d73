"""The plug-in over a frozen CLIP: windows, sizes, joining, and what it leaves of CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.catalog.profiles import find_model
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint, SafetensorsWriter
from exporter.families.reference.medbridge import MedBridgeConfig, MedBridgeModel
from exporter.families.shapes.find import shape_of, shape_of_config
from exporter.families.table import TASK_FAMILIES
from exporter.families.task_models.medbridge import (
    Windows,
    bridged_image,
    join_plugin,
    open_preparer,
    torch_outputs,
)
from exporter.families.tasks import VISION_GRAPH, task_tensors
from exporter.runtimes.graphs import TorchGraphs
from tests.support.task_adapters import write_task_adapter
from tests.support.task_inputs import noise
from tests.support.tiny_clip import write_tiny_chexzero, write_tiny_clip
from tests.support.tiny_medbridge import BRIDGE, write_plugin, write_tiny_medbridge

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_medbridge(tmp_path_factory.mktemp("medbridge") / "joined")


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row of each pixel."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2))


@pytest.mark.parametrize("size", [(70, 70), (100, 60), (31, 97), (1, 5)])
@pytest.mark.parametrize("windows", [Windows(1, 0.25), Windows(2, 0.25), Windows(3, 0.5)])
def test_windows_cover_the_middle_square(size: tuple[int, int], windows: Windows) -> None:
    picture = coordinates(*size)
    whole, *cut = windows.cut(picture)
    assert whole is picture
    assert len(cut) == windows.views - 1
    seen = {
        (int(c), int(r)) for view in cut for c, r, _ in np.asarray(view).reshape(-1, 3).tolist()
    }
    square = min(size)
    middle = {n: range((n - square) // 2, (n - square) // 2 + square) for n in size}
    # An odd remainder is rounded to one side or the other.
    missing = {(c, r) for c in middle[size[0]] for r in middle[size[1]]} - seen
    assert len(missing) <= (square if (max(size) - square) % 2 else 0)
    assert max(view.width for view in cut) - min(view.width for view in cut) <= 1


def test_neighbours_share_as_much_as_they_should() -> None:
    _, first, second, *_ = Windows(3, 0.25).cut(coordinates(250, 250))
    edges = [(int(np.asarray(v)[0, 0, 0]), v.width) for v in (first, second)]
    # 250 = edge + 2 steps of 3/4 edge: windows of 100 pixels, one every 75.
    assert edges == [(0, 100), (75, 100)]


def test_every_view_counts(folder: Path) -> None:
    graphs, picture = TorchGraphs(folder, threads=1), noise(64, 64)
    views = graphs.preparer.images([picture])["pixel_values"]
    assert views.shape == (1, 5, 3, 32, 32)
    before = graphs.run(VISION_GRAPH, {"pixel_values": views})["image_embeds"]
    for view in range(5):
        changed = views.copy()
        changed[:, view] = 0
        after = graphs.run(VISION_GRAPH, {"pixel_values": changed})["image_embeds"]
        assert np.abs(after - before).max() > 1e-3 * np.abs(before).max()


def test_windows_are_a_set(folder: Path) -> None:
    """No position tells one window from another; the whole image has its own place."""
    graphs = TorchGraphs(folder, threads=1)
    views = graphs.preparer.images([noise(64, 64)])["pixel_values"]
    orders = ([0, 1, 2, 3, 4], [0, 3, 1, 4, 2], [1, 0, 2, 3, 4])
    first, mixed, other = (
        graphs.run(VISION_GRAPH, {"pixel_values": views[:, order]})["image_embeds"]
        for order in orders
    )
    np.testing.assert_allclose(mixed, first, rtol=1e-4, atol=1e-5)
    assert np.abs(other - first).max() > 1e-3


def test_an_untrained_plugin_is_the_frozen_clip(folder: Path) -> None:
    config = read_config(folder / "config.json")
    kept = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "dtype")}
    torch.manual_seed(0)
    model = MedBridgeModel(MedBridgeConfig(**kept)).eval()
    frozen = CLIPModel(model.config)
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("bridge.")}
    frozen.load_state_dict(state)
    feed = open_preparer(folder).images([noise(64, 64), noise(40, 90)])
    with torch.inference_mode():
        found = torch_outputs(model, VISION_GRAPH, feed)["image_embeds"]
        whole = torch.from_numpy(feed["pixel_values"][:, 0])
        expected = frozen.eval().get_image_features(pixel_values=whole).pooler_output.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_training_reaches_the_plugin_and_nothing_else(folder: Path) -> None:
    model = TorchGraphs(folder, threads=1).model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("bridge."))
    feed = open_preparer(folder).images([noise(64, 64), noise(40, 90)])
    model.encode_image(torch.from_numpy(feed["pixel_values"])).square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("bridge."):
            assert parameter.grad is None
        elif not name.endswith("k_proj.bias"):  # softmax does not see what is added to all keys
            assert parameter.grad.abs().max() > 0, name


def test_joining_keeps_both_parts(folder: Path) -> None:
    joined = Checkpoint.open(folder)
    frozen = Checkpoint.open(folder.parent / "joined-clip")
    added = Checkpoint.open(folder.parent / "joined-plugin")
    assert joined.tensors.keys() == frozen.tensors.keys() | added.tensors.keys()
    for part in (frozen, added):
        for name in part.tensors:
            np.testing.assert_array_equal(joined.raw(name), part.raw(name))
    before, after = (
        read_config(f / "config.json") for f in (folder.parent / "joined-clip", folder)
    )
    assert after["bridge_config"] == BRIDGE
    assert after["vision_config"] == before["vision_config"]
    listed = task_tensors(TASK_FAMILIES["medbridge"], after)
    assert {t.name: t.shape for t in listed} == {n: i.shape for n, i in joined.tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bridge.queries"), r"'bridge\.queries' is missing"),
        (
            lambda t: t.update({"bridge.queries": np.zeros((7, 64), np.float16)}),
            r"\[7, 64\].*\[6, 64\]",
        ),
        (lambda t: t.update({"bridge.gate": np.zeros(1, np.float16)}), "no such tensor"),
        (lambda t: t.update({"logit_scale": np.zeros((), np.float16)}), r"begin with bridge\."),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    plugin = Checkpoint.open(folder.parent / "joined-plugin")
    tensors = {name: plugin.raw(name) for name in plugin.tensors}
    change(tensors)
    entries = {name: ("F16", array.shape) for name, array in tensors.items()}
    with SafetensorsWriter(tmp_path / "bad.safetensors", entries) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    (tmp_path / "out").mkdir()
    clip = folder.parent / "joined-clip"
    with pytest.raises(InputRefused, match=message) as caught:
        join_plugin(clip, tmp_path / "bad.safetensors", BRIDGE, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_chexzero_is_merged_first_and_keeps_its_images(tmp_path: Path) -> None:
    base = write_tiny_chexzero(tmp_path / "base")
    merged, out = tmp_path / "merged", tmp_path / "out"
    for made in (merged, out):
        made.mkdir()
    merge_adapters(base, [], merged)
    plugin = write_plugin(tmp_path / "plugin", merged, BRIDGE, seed=3)
    with pytest.raises(InputRefused, match="model_type is 'chexzero'; expected 'clip'"):
        join_plugin(base, plugin, BRIDGE, out)
    join_plugin(merged, plugin, BRIDGE, out)
    preparer = open_preparer(out)
    views = preparer.images([noise(97, 31)])["pixel_values"]
    assert preparer.template == "{}"
    # One gray channel three times, as CheXzero has it; CLIP's own has three.
    np.testing.assert_array_equal(views[:, :, 0], views[:, :, 1])


def test_an_adapter_on_top_merges_and_is_proven(folder: Path, tmp_path: Path) -> None:
    """LoRA may be put on the plug-in and the frozen part alike."""
    adapter = write_task_adapter(
        folder, tmp_path / "adapter", ["q_proj", "v_proj"], task_type="FEATURE_EXTRACTION"
    )
    out = tmp_path / "out"
    out.mkdir()
    proof = merge_adapters(folder, [adapter], out)
    changed = {t.tensor for t in proof.targets}
    assert "bridge.layers.1.cross_attn.q_proj.weight" in changed
    assert "vision_model.encoder.layers.0.self_attn.v_proj.weight" in changed
    assert prove_logits(folder, [adapter], out).method == "outputs"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid", 0, "grid is 0; expected a positive integer"),
        ("overlap", 1.0, "overlap of 1.0"),
        ("overlap", -0.5, "overlap is -0.5"),
        ("num_attention_heads", 5, "5 heads.*divide 64"),
        ("num_queries", "many", "num_queries is 'many'"),
        (None, None, "bridge_config is None; expected an object"),
    ],
)
def test_a_bad_config_is_refused(folder: Path, key: str | None, value: Any, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if key is None:
        del config["bridge_config"]
    else:
        config["bridge_config"][key] = value
    with pytest.raises(InputRefused, match=message):
        bridged_image(config)


def test_a_plan_counts_every_parameter(folder: Path) -> None:
    profile, config = find_model("medbridge"), read_config(folder / "config.json")
    for shape, sizes in (
        (shape_of(profile), {"model_type": "medbridge", "bridge_config": {}}),
        (shape_of_config("x", "medbridge", config, {}), config),
    ):
        kept = {k: v for k, v in sizes.items() if k not in ("model_type", "torch_dtype")}
        with torch.device("meta"):
            model = MedBridgeModel(MedBridgeConfig(**kept))
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert shape.tower.tiles == 5


def test_no_tensor_is_left_out_by_default_sizes(tmp_path: Path) -> None:
    clip = write_tiny_clip(tmp_path / "clip")
    plugin, out = write_plugin(tmp_path / "plugin", clip, {}, seed=5), tmp_path / "out"
    out.mkdir()
    join_plugin(clip, plugin, {}, out)
    spec = bridged_image(read_config(out / "config.json"))
    assert (spec.queries, spec.block.layers, spec.windows) == (16, 2, Windows(2, 0.25))
    assert (spec.block.heads, spec.block.intermediate_size) == (4, 128)
