"""ViT-GPT2: its names and shapes, its images and prompts, and its Conv1D layers when quantized."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.adapters.base import open_base
from exporter.adapters.merge import merge_adapters
from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS
from exporter.families.captioners.vision_encoder_decoder import (
    decoder_spec,
    open_preparer,
    tower_spec,
)
from exporter.graphs.export import export_model
from exporter.pipeline.budget import read_budget
from exporter.pipeline.forecast import check_scheme
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES, find_scheme
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner
from exporter.runtimes.weights import float_tensors
from tests.support.tiny_ved import CONTEXT, SIDE, write_tiny_ved

torch.set_num_threads(1)
SIZES = [(64, 48), (31, 97), (32, 32), (5, 3), (400, 250)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_ved(tmp_path_factory.mktemp("ved"))


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    merge_adapters(base, [], out)
    return out


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 100 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def test_names_and_shapes_of_the_published_size_are_those_of_the_real_class() -> None:
    transformers = pytest.importorskip("transformers")
    facts = find_model("vit-gpt2").facts
    config: dict[str, Any] = {"encoder": {}, "decoder": {}}
    for key, value in known_config(find_model("vit-gpt2")).items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    kind = transformers.VisionEncoderDecoderModel
    with torch.device("meta"):
        model = kind(transformers.VisionEncoderDecoderConfig.from_dict(config))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    specs = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    assert {t.name: t.shape for t in specs} == expected
    assert len(specs) == len(expected)
    assert sum(math.prod(s) for s in expected.values()) == facts.parameters


def test_published_names_become_the_newest(base: Path, tmp_path: Path) -> None:
    new = Checkpoint.open(write_tiny_ved(tmp_path / "new", old=False))
    found = open_base(base)
    known = {name for name in found.tensors.tensors if not BUFFERS.search(name)}
    assert len(known) < len(found.tensors.tensors)
    assert known - {found.head} == set(new.tensors)
    assert found.tied


def test_masks_of_older_versions_are_no_quantized_tensors(base: Path) -> None:
    kinds = {i.dtype for i in Checkpoint.open(base).tensors.values()}
    assert "U8" in kinds
    open_base(base)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_equal_transformers(base: Path, size: tuple[int, int], mode: str) -> None:
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    theirs = vit.ViTImageProcessorPil.from_pretrained(base)
    image = picture(*size, mode)
    found = open_preparer(base).prepare([image], "").pixel_values
    expected = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_is_what_the_caption_goes_on_from(base: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    preparer, image = open_preparer(base), picture(20, 20)
    start = config_of(base)["decoder_start_token_id"]
    assert preparer.image_token_id is None
    assert preparer.prepare([image], "").input_ids.tolist() == [start]
    text = "Axial CT of the"
    expected = [start, *tokenizer(text)["input_ids"]]
    assert preparer.prepare([image], text).input_ids.tolist() == expected
    assert preparer.decode([*expected, start]) == text


def test_what_a_prompt_cannot_be(base: Path) -> None:
    preparer, image = open_preparer(base), picture(20, 20)
    with pytest.raises(InputRefused, match="2 images in a prompt; this model captions one"):
        preparer.prepare([image, image], "")
    with pytest.raises(InputRefused, match="0 images"):
        preparer.prepare([], "")
    with pytest.raises(InputRefused, match=f"the model has {CONTEXT}; shorten"):
        preparer.prepare([image], "x9 " * CONTEXT)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("decoder", {"model_type": "bert"}, "decoder.model_type is 'bert'; expected gpt2"),
        ("decoder", {"add_cross_attention": False}, "add_cross_attention is False; only True"),
        ("decoder", {"scale_attn_by_inverse_layer_idx": True}, "is True; only False"),
        ("decoder", {"n_head": 5}, "hidden size 64 and 5 heads"),
        ("decoder", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("encoder", {"model_type": "swin"}, "encoder.model_type is 'swin'; expected vit"),
        ("encoder", {"qkv_bias": False}, "qkv_bias is false"),
        ("encoder", {"num_channels": 1}, "1 channels"),
    ],
)
def test_configs_of_other_networks_are_refused(
    base: Path, section: str, values: dict[str, Any], message: str
) -> None:
    config = config_of(base)
    config[section] |= values
    with pytest.raises(InputRefused, match=message):
        tower_spec(config)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("preprocessor_config.json", {"size": 48}, r"images become \(48, 48\) pixels"),
        ("preprocessor_config.json", {"do_resize": False}, "images become None pixels"),
        ("preprocessor_config.json", {"size": "big"}, "bad image settings"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is true"),
        ("config.json", {"decoder_start_token_id": 9999}, "decoder_start_token_id is 9999"),
    ],
)
def test_settings_that_disagree_are_refused(
    copy: Path, file: str, values: dict[str, Any], message: str
) -> None:
    change(copy / file, **values)
    with pytest.raises(InputRefused, match=message):
        open_preparer(copy)


def test_newest_settings_mean_the_same(base: Path, tmp_path: Path) -> None:
    new, image = write_tiny_ved(tmp_path / "new", old=False), picture(50, 40)
    found, old = (open_preparer(f).prepare([image], "Chest") for f in (new, base))
    np.testing.assert_array_equal(found.pixel_values, old.pixel_values)
    assert found.input_ids.tolist() == old.input_ids.tolist()


FOLDING = [name for name, s in SCHEMES.items() if s.calibrated and name != "int4-gptq"]


@pytest.mark.parametrize("name", FOLDING)
def test_schemes_for_llama_blocks_are_refused_before_any_work(
    base: Path, merged: Path, name: str
) -> None:
    scheme, config = find_scheme(name), config_of(base)
    budget = read_budget(None, None, mixed=bool(scheme.choices))
    message = f"scheme {name} works with Llama decoders alone.*use int4-gptq, int4-hqq or int4-rtn"
    with pytest.raises(InputRefused, match=message):
        check_scheme(base, scheme, budget)
    with pytest.raises(InputRefused, match=message):
        plan_layers(Checkpoint.open(merged), decoder_spec(config), tower_spec(config), scheme)


@pytest.mark.parametrize("name", ["int8", "int4-rtn", "int4-hqq", "bnb-nf4", "bnb-int8"])
def test_each_quantized_matrix_is_near_the_stored_one(
    merged: Path, tmp_path: Path, name: str
) -> None:
    """Blocks run along the inputs of a Conv1D, and torch gets the weights back as it stores them."""
    quantize_model(merged, tmp_path, find_scheme(name), threads=1)
    report = json.loads((tmp_path / "quantization.json").read_text())
    source, bound = Checkpoint.open(merged), {"int8": 0.01, "bnb-int8": 0.02}.get(name, 0.15)
    found, turned = dict(float_tensors(tmp_path)), 0
    for layer in report["layers"]:
        weight = source.float32(layer["name"])
        shape = (layer["columns"], layer["rows"]) if layer.get("turned") else None
        turned += shape is not None
        assert weight.shape == (shape or (layer["rows"], layer["columns"]))
        error = np.linalg.norm(found[layer["name"]] - weight) / np.linalg.norm(weight)
        assert error < bound
        assert math.isclose(error, layer["relative_error"], rel_tol=1e-3)
    assert turned == 7 * config_of(merged)["decoder"]["n_layer"]


def test_quantized_graphs_compute_the_quantized_weights(merged: Path, tmp_path: Path) -> None:
    """Against torch with the dequantized weights: what is left is float32 arithmetic."""
    for name in ("int8", "int4-hqq", "bnb-nf4"):
        quantized, out = tmp_path / f"{name}-q", tmp_path / name
        quantized.mkdir()
        out.mkdir()
        quantize_model(merged, quantized, find_scheme(name), threads=1)
        export_model(quantized, out, accuracy_level=0)
        ours, theirs = OrtCaptioner(out / "model", threads=1), TorchCaptioner(quantized, threads=1)
        image, tokens = picture(60, 44), list(range(20, 40))
        found, expected = (c.score(image, "Chest", tokens) for c in (ours, theirs))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert ours.caption(image, "", 12).tokens == theirs.caption(image, "", 12).tokens


def test_other_widths_meet_through_the_projection(tmp_path: Path) -> None:
    """Encoder and decoder of different hidden sizes, and a head of its own."""
    base = write_tiny_ved(
        tmp_path / "base",
        old=False,
        encoder={"hidden_size": 48},
        decoder={"tie_word_embeddings": False, "activation_function": "gelu"},
    )
    merged, out = tmp_path / "merged", tmp_path / "out"
    merged.mkdir()
    out.mkdir()
    merge_adapters(base, [], merged)
    assert "enc_to_dec_proj.weight" in Checkpoint.open(merged)
    export_model(merged, out, float_storage="float32")
    ours, theirs = OrtCaptioner(out / "model", threads=1), TorchCaptioner(merged, threads=1)
    image = picture(SIDE, SIDE)
    found, expected = (c.caption(image, "", 24) for c in (ours, theirs))
    assert found.tokens == expected.tokens
    pixels = torch.from_numpy(theirs.preparer.prepare([image], "").pixel_values)
    generated = theirs.model.generate(pixel_values=pixels, max_new_tokens=24, do_sample=False)
    assert generated[0, 1 : 1 + len(found.tokens)].tolist() == list(found.tokens)
