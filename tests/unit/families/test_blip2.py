"""BLIP-2 and XrayGPT: sizes, tensors, images and prompts against transformers and the published code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from exporter.adapters.merge import merge_adapters
from exporter.calibrate.prompts import embed_prompts
from exporter.calibrate.walk import walk_decoder
from exporter.core.cases import Case
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.blip2 import decoder_spec, open_preparer, proof_inputs, tower_spec
from exporter.families.checkpoints import modern_config
from exporter.families.images.clip import clip_pixels
from exporter.families.prompts.blip2 import read_blip_settings
from exporter.families.specs.opt import OptSpec
from exporter.graphs.export import export_model
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble
from exporter.runtimes.ort import OrtCaptioner
from tests.support.tiny_blip2 import QUERIES, SIDE, broken, write_tiny_blip2, write_tiny_xraygpt

torch.set_num_threads(1)
PROMPT = "Describe this medical image."
OPT_27B: dict[str, Any] = {
    "model_type": "blip-2",
    "image_token_index": 50265,
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "text_config": {
        "model_type": "opt",
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "vision_config": {"dropout": 0.0, "model_type": "blip_2_vision_model"},
}
XRAYGPT: dict[str, Any] = {"model_type": "mini_gpt4"}


def real_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' class, a tied head not counted."""
    settings = {k: v for k, v in modern_config(config).items() if k != "model_type"}
    with torch.device("meta"):
        model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**settings))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [OPT_27B, XRAYGPT])
def test_the_specs_list_every_tensor_of_the_real_class(config: dict[str, Any]) -> None:
    listed = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    assert {t.name: t.shape for t in listed} == real_shapes(config)
    assert len(listed) == len({t.name for t in listed})


def test_the_count_is_the_published_one() -> None:
    shapes = real_shapes(OPT_27B)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 3744761856


@pytest.mark.parametrize("decoder", ["opt", "llama"])
def test_absent_keys_count_with_the_class_defaults(decoder: str) -> None:
    config = {"text_config": {"model_type": decoder}, "vision_config": None}
    filled = transformers.Blip2Config(text_config={"model_type": decoder}).to_dict()
    assert tower_spec(config) == tower_spec(filled)
    assert decoder_spec(config) == decoder_spec(filled)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "model_type", "t5"),
        ("text_config", "model_type", None),
        ("text_config", "activation_function", "gelu"),
        ("text_config", "do_layer_norm_before", False),
        ("text_config", "word_embed_proj_dim", 32),
        ("text_config", "num_attention_heads", 5),
        ("vision_config", "qkv_bias", False),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "patch_size", 33),
        ("vision_config", "hidden_act", "relu"),
        ("qformer_config", "use_qformer_text_input", True),
        ("qformer_config", "num_attention_heads", 5),
        ("qformer_config", "cross_attention_frequency", 0),
    ],
)
def test_another_network_is_refused(
    opt: Path, part: str, key: str, value: object, tmp_path: Path
) -> None:
    config = json.loads((opt / "config.json").read_text())
    config[part][key] = value
    with pytest.raises(InputRefused, match=rf"config\.json: {part}") as caught:
        tower_spec(config)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_blip2(tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def xraygpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xraygpt(tmp_path_factory.mktemp("xraygpt"))


@pytest.fixture(scope="module")
def merged(xraygpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    merge_adapters(xraygpt, [], out)
    return out


# --- Images


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (17, 400), (224, 224), (1, 50)])
@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"size": {"height": 224, "width": 224}, "resample": 3},
        {"size": 56, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"size": {"height": 40, "width": 72}, "resample": 2, "do_rescale": False},
        {"size": {"height": 40, "width": 40}, "do_normalize": False},
    ],
)
def test_pixels_equal_transformers(size: tuple[int, int], raw: dict[str, Any]) -> None:
    for mode in ("RGB", "L", "RGBA"):
        image = picture(*size, mode)
        expected = BlipImageProcessorPil(**raw)(image, return_tensors="np")["pixel_values"][0]
        found = clip_pixels(image, read_blip_settings(raw, "here"))
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("raw", [{"do_center_crop": True}, {"size": {"height": 0, "width": 8}}])
def test_settings_of_another_processor_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="here: "):
        read_blip_settings(raw, "here")


# --- Prompts


def test_a_prompt_equals_blip2_processors(opt: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(opt)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)
    preparer = open_preparer(opt)
    for prompt in (PROMPT, "Question: what is shown? Answer:", " two  spaces ", ""):
        expected = processor(images=picture(70, 50), text=prompt, return_tensors="np")
        found = preparer.prepare([picture(70, 50)], prompt)
        assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert np.array_equal(found.pixel_values, expected["pixel_values"])
    several = preparer.prepare([picture(70, 50), picture(9, 9)], PROMPT).input_ids
    one = preparer.prepare([picture(70, 50)], PROMPT).input_ids
    assert several.tolist() == [preparer.image_token_id] * QUERIES + one.tolist()


def test_xraygpts_prompt_is_tokenized_in_pieces(merged: Path) -> None:
    """As prompt_wrap of the published code: embeddings between two texts, one start token in front."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(merged)

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    question = "Describe the given chest x-ray image in detail."
    wrapped = f"###Patient: <Img><ImageHere></Img> {question} ###Doctor: "
    before, after = map(tokens, wrapped.split("<ImageHere>"))
    expected = [tokenizer.bos_token_id, *before, *[0] * QUERIES, *after]
    preparer = open_preparer(merged)
    assert preparer.prepare([picture(70, 50)], question).input_ids.tolist() == expected
    assert preparer.image_token_id == 0


def test_an_answer_of_xraygpt_ends_at_its_separator(merged: Path) -> None:
    vocabulary = json.loads((merged / "tokenizer.json").read_text())["model"]["vocab"]
    expected = {vocabulary[text] for text in ("</s>", "▁###", "##")}
    assert open_preparer(merged).generation.stop_ids == expected


def test_a_typed_image_marker_is_refused(opt: Path) -> None:
    with pytest.raises(InputRefused, match="<image>"):
        open_preparer(opt).prepare([picture(9, 9)], "What is <image>?")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"image_token_index": 7}, "'<image>' is token"),
        ("config.json", {"image_token_index": None}, "image_token_index is None"),
        ("config.json", {"stop_tokens": "###"}, "stop_tokens is '###'"),
        ("preprocessor_config.json", {"size": 40}, "takes 32 x 32"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "takes 32 x 32"),
    ],
)
def test_files_that_disagree_are_refused(
    opt: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(opt, tmp_path / "copy")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputRefused, match=message) as caught:
        open_preparer(folder)
    assert "\n" not in str(caught.value)


def test_a_proof_has_two_images(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    ids = np.arange(5, 17)
    arrays, tiles = proof_inputs(config, np.random.default_rng(0), ids)
    assert tiles == len(arrays["pixel_values"]) == 2
    assert int((arrays["input_ids"] == 0).sum()) == 2 * QUERIES


# --- Decoders


def test_a_stored_head_equal_to_opts_embedding_is_read(opt: Path, tmp_path: Path) -> None:
    """As published: the class ties them, and the file has both."""
    name = "language_model.lm_head.weight"
    table = load_file(opt / "model.safetensors")["language_model.model.decoder.embed_tokens.weight"]
    assert isinstance(decoder_spec(json.loads((opt / "config.json").read_text())), OptSpec)
    prepared = []
    for number, change in enumerate(({}, {name: table.copy()})):
        folder = broken(opt, tmp_path / f"base{number}", change)
        merged, out = tmp_path / f"merged{number}", tmp_path / f"out{number}"
        merged.mkdir()
        out.mkdir()
        merge_adapters(folder, [], merged)
        export_model(merged, out, float_storage="float32")
        captioner = OrtCaptioner(out / "model", threads=1)
        inputs = captioner.preparer.prepare([picture(70, 50)], PROMPT)
        engine = captioner.engine
        prepared.append(engine.forced(inputs, engine.features(inputs), [7, 8, 9]))
    assert np.array_equal(*prepared)


@pytest.mark.parametrize(("scheme", "limit"), [("int4-gptq", 0.05), ("int4-awq", 0.05)])
def test_calibrated_schemes_stay_near(
    merged: Path, scheme: str, limit: float, tmp_path: Path
) -> None:
    """XrayGPT's decoder walked block by block, its prompts with their image rows."""
    config = json.loads((merged / "config.json").read_text())
    spec, chosen = decoder_spec(config), find_scheme(scheme)
    assert not isinstance(spec, OptSpec)
    paths = [tmp_path / f"{width}.png" for width in (64, 97, 40)]
    for path in paths:
        picture(int(path.stem), 50).save(path)
    cases = [Case(p.stem, p, p.stem, "x-ray", "Axial CT of the abdomen.") for p in paths]
    folders = {name: tmp_path / name for name in ("float", "quantized", "exported")}
    for folder in folders.values():
        folder.mkdir()
    export_model(merged, folders["float"], float_storage="float32")
    reference = OrtCaptioner(folders["float"] / "model", threads=1)
    prompts = embed_prompts(merged, folders["float"] / "model", cases, PROMPT, threads=1)
    checkpoint = Checkpoint.open(merged)
    store = BlockStore(tmp_path / "blocks", scheme)
    plans = plan_layers(checkpoint, spec, tower_spec(config), chosen)
    walk_decoder(checkpoint, spec, prompts, BlockQuantizer(store, spec, plans), threads=1)
    assemble(merged, folders["quantized"], chosen, spec, store, threads=1)
    export_model(folders["quantized"], folders["exported"])
    candidate = OrtCaptioner(folders["exported"] / "model", threads=1)
    divergences = []
    for path, prompt in zip(paths, prompts, strict=True):
        inputs = reference.preparer.prepare([Image.open(path)], PROMPT)
        answer = prompt.tokens[prompt.answer].tolist()
        p, q = (
            torch.from_numpy(e.forced(inputs, e.features(inputs), answer).copy())
            .double()
            .log_softmax(-1)
            for e in (reference.engine, candidate.engine)
        )
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert 0 < np.mean(divergences) < limit
