"""CNN-Transformer: names and sizes of its DenseNet, and the reference module against its own parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.families.base import BUFFERS
from exporter.families.captioners.cnn_transformer import decoder_spec, tower_spec
from exporter.families.reference.cnn_transformer import CNNTransformer, CNNTransformerConfig
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.tiny_cnn import write_tiny_cnn

torch.set_num_threads(1)
# torchvision's densenet121 has 7,978,856 parameters, 1,025,000 of them in its classifier.
DENSENET_121 = 7_978_856 - 1_025_000
# As torchvision publishes them.
NAMES = {
    "conv0.weight": (64, 3, 7, 7),
    "norm0.running_var": (64,),
    "denseblock1.denselayer1.norm1.weight": (64,),
    "denseblock1.denselayer6.conv1.weight": (128, 224, 1, 1),
    "transition1.conv.weight": (128, 256, 1, 1),
    "transition3.norm.bias": (1024,),
    "denseblock4.denselayer16.conv2.weight": (32, 128, 3, 3),
    "norm5.weight": (1024,),
}


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(small).resize((60, 44))


def test_densenet_121_is_torchvisions() -> None:
    cnn = tower_spec({}).cnn
    shapes = {t.name.removeprefix("cnn.features."): t.shape for t in cnn.tensors()}
    assert {name: shapes[name] for name in NAMES} == NAMES
    trained = [s for name, s in shapes.items() if "running" not in name]
    assert sum(map(math.prod, trained)) == DENSENET_121
    assert (cnn.cells(224), cnn.channels) == (7, 1024)


def test_specs_have_the_tensors_of_the_module() -> None:
    with torch.device("meta"):
        model = CNNTransformer(CNNTransformerConfig())
    expected = {n: tuple(v.shape) for n, v in model.state_dict().items() if not BUFFERS.search(n)}
    specs = [*decoder_spec({}).tensors(), *tower_spec({}).tensors()]
    assert {t.name: t.shape for t in specs} == expected
    assert len(specs) == len(expected)


@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": True, "hidden_act": "gelu"}])
def test_graphs_and_kept_keys_equal_torchs_own_layers(tmp_path: Path, changed: Any) -> None:
    base, merged, out = write_tiny_cnn(tmp_path / "base", **changed), tmp_path / "m", tmp_path / "o"
    merged.mkdir()
    out.mkdir()
    merge_adapters(base, [], merged)
    export_model(merged, out, float_storage="float32")
    ours, theirs = OrtCaptioner(out / "model", threads=1), TorchCaptioner(merged, threads=1)
    tokens = list(range(20, 44))
    inputs = theirs.preparer.prepare([picture(1)], "Chest")
    whole = torch.from_numpy(np.concatenate([inputs.input_ids, tokens]))[None]
    with torch.inference_mode():
        pixels = torch.from_numpy(inputs.pixel_values)
        expected = theirs.model(input_ids=whole, pixel_values=pixels).logits[0].numpy()
    expected = expected[len(inputs.input_ids) - 1 :]
    for captioner in (ours, theirs):
        found = captioner.score(picture(1), "Chest", tokens)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    other = ours.score(picture(2), "Chest", tokens)
    assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()
    assert ours.caption(picture(1), "", 16).tokens == theirs.caption(picture(1), "", 16).tokens


def test_the_cross_projection_is_stored_once_and_quantized(tmp_path: Path) -> None:
    base, merged, quantized = write_tiny_cnn(tmp_path / "base"), tmp_path / "m", tmp_path / "q"
    merged.mkdir()
    quantized.mkdir()
    merge_adapters(base, [], merged)
    quantize_model(merged, quantized, find_scheme("int4-hqq"), threads=1)
    report = json.loads((quantized / "quantization.json").read_text())
    rows = {layer["name"]: layer for layer in report["layers"]}
    assert rows["decoder.layers.0.multihead_attn.in_proj_weight"]["bits"] == 4
    assert rows["encoder.layers.0.self_attn.in_proj_weight"]["bits"] == 8
    assert not any("cnn" in name for name in rows)
    (tmp_path / "o").mkdir()
    export_model(quantized, tmp_path / "o", accuracy_level=0)
    ours = OrtCaptioner(tmp_path / "o/model", threads=1)
    theirs, tokens = TorchCaptioner(quantized, threads=1), list(range(9))
    found, expected = (c.score(picture(1), "", tokens) for c in (ours, theirs))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_config": [6, 0]}, "expected positive integers"),
        ({"block_config": "abc"}, "expected positive integers"),
        ({"image_size": 4}, "leaves no cell"),
        ({"num_attention_heads": 7}, "hidden size 512 and 7 heads"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ],
)
def test_configs_of_other_networks_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        tower_spec(changed)
