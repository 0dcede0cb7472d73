"""Values beyond float16 are found where they are, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.core.errors import InputRefused
from exporter.families.captioners.idefics3 import decoder_spec, tower_spec
from exporter.graphs import writer
from exporter.graphs.export import export_model
from exporter.graphs.standard.ranges import beyond_float16

from .conftest import make_model, save

Out = Callable[[str], Path]


def test_a_layer_that_overflows_is_named(
    tmp_path: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model({}, {})
    config = model.config.to_dict()
    feeds = list(decoder_spec(config).example_feeds(np.random.default_rng(0)))
    export_model(save(model, tmp_path / "m"), out("e"), dialect="standard")
    path = Path("model/onnx/decoder_model_merged.onnx")
    assert beyond_float16(tmp_path / "e" / path, feeds) == ()
    with torch.no_grad():
        model.model.text_model.layers[1].mlp.up_proj.weight.mul_(2e5)
    # Weights in a file of their own are found as well.
    monkeypatch.setattr(writer, "INLINE_LIMIT", 0)
    export_model(save(model, tmp_path / "w"), out("f"), dialect="standard", float_storage="float32")
    # All positions: behind the last attention the graph drops those nobody asked for.
    whole = {**feeds[0], "num_logits_to_keep": np.array(0)}
    found = beyond_float16(tmp_path / "f" / path, [whole])
    names = [value.node for value in found]
    assert names[0] == "layers.1.up"
    assert not [n for n in names if n.startswith("layers.0")]
    seen: list[float] = []
    layer = model.model.text_model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *call: seen.append(float(call[-1].abs().max())))
    with torch.no_grad():
        model.model.text_model(inputs_embeds=torch.from_numpy(feeds[0]["inputs_embeds"]))
    assert found[0].largest == pytest.approx(seen[0], rel=1e-4)
    assert seen[0] > 65504
    assert "float16 ends at 65504" in found[0].reason
    assert "head" not in names


def test_a_tower_is_run_on_its_pixels(tmp_path: Path, out: Out) -> None:
    model = make_model({}, {})
    with torch.no_grad():
        model.model.vision_model.encoder.layers[0].mlp.fc2.bias[3] = 7e4
    export_model(save(model, tmp_path / "m"), out("e"), dialect="standard", float_storage="float32")
    feeds = list(tower_spec(model.config.to_dict()).example_feeds(np.random.default_rng(0)))
    path = tmp_path / "e" / "model" / "onnx" / "vision_encoder.onnx"
    found = beyond_float16(path, feeds)
    assert found[0].operator == "Add"
    assert found[0].largest == pytest.approx(7e4, rel=1e-3)
    with pytest.raises(InputRefused, match="does not run"):
        beyond_float16(path, [{"pixel_values": np.zeros(3, np.float32)}])
    with pytest.raises(InputRefused, match="no such file"):
        beyond_float16(tmp_path / "absent.onnx", feeds)
