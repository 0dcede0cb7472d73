"""SigLIP's specs, texts, settings and scores: what is read from a folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from exporter.adapters.merge import merge_adapters
from exporter.catalog.profiles import find_model
from exporter.catalog.shapes import known_config
from exporter.cli.answers import Question, answer, show
from exporter.core.errors import InputRefused
from exporter.families.check import config_value
from exporter.families.prompts.siglip import canonical_text
from exporter.families.shapes.find import shape_of
from exporter.families.table import TASK_FAMILIES, config_defaults
from exporter.families.task_models.siglip import graphs, open_preparer
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, task_tensors
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.graphs import OrtGraphs
from exporter.runtimes.tasks.zero_shot import ZeroShot
from tests.support.task_inputs import noise, pictures
from tests.support.tiny_siglip import LENGTH, RECORDED, SIDE, TOKENS, write_tiny_siglip

torch.set_num_threads(1)
# Tokens of another kind, as SigLIP 2 has them.
BPE = {"type": "BPE", "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2}, "merges": []}
LABELS = ("pleural effusion", "Pneumothorax?", "no finding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs in float32 arithmetic and storage."""
    root = tmp_path_factory.mktemp("exported")
    merged, out = root / "merged", root / "out"
    merged.mkdir()
    out.mkdir()
    merge_adapters(folder, [], merged)
    export_model(merged, out, float_storage="float32", accuracy_level=0)
    return out / "model"


def changed(folder: Path, out: Path, name: str, edit: Callable[[Any], None]) -> Path:
    """A copy of `folder` with one JSON file changed."""
    copy = shutil.copytree(folder, out / "copy")
    content = json.loads((copy / name).read_text())
    edit(content)
    (copy / name).write_text(json.dumps(content))
    return copy


def test_the_profiles_sizes_give_the_tensors_of_the_real_class() -> None:
    profile = find_model("medsiglip")
    config: dict[str, Any] = {"model_type": "siglip", "text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        config[section][leaf] = value
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {t.name: t.shape for t in task_tensors(TASK_FAMILIES["siglip"], config)} == expected
    count = sum(p.numel() for p in model.parameters())
    assert shape_of(profile).parameters == count
    # As the model card says: 400M each.
    halves = [
        sum(p.numel() for n, p in model.named_parameters() if n.startswith(half))
        for half in ("vision_model.", "text_model.")
    ]
    assert all(4e8 < half < 4.6e8 for half in halves)


def test_defaults_are_those_of_the_config_class() -> None:
    real = SiglipConfig().to_dict()
    empty: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    for key in config_defaults("siglip"):
        section, _, leaf = key.rpartition(".")
        assert config_value(empty, key, "siglip") == real[section][leaf], key
    found = graphs({"model_type": "siglip"})
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig())
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {t.name: t.shape for s in found.values() for t in s.tensors()} == expected


def test_roles_tell_pixels_from_text(folder: Path) -> None:
    found = graphs(json.loads((folder / "config.json").read_text()))
    vision, text = (list(found[name].tensors()) for name in (VISION_GRAPH, TEXT_GRAPH))
    assert {t.role for t in vision} == {"vision", "float"}
    assert {t.role for t in text} == {"embedding", "decoder", "float"}
    assert all(t.reason for t in (*vision, *text) if t.role == "float")
    matrices = {t.name for t in (*vision, *text) if len(t.shape) == 2 and t.role == "float"}
    assert {name.split(".")[-2] for name in matrices} == {"position_embedding"}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"text_config": {"hidden_size": 50, "num_attention_heads": 4}}, "heads that divide it"),
        ({"text_config": {"hidden_size": 384}}, "vectors of 384"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act is 'relu'"),
        ({"text_config": 3}, "text_config is 3; expected an object"),
        ({"vision_config": {"num_channels": 1}}, "1 channels"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size"),
        ({"vision_config": {"patch_size": 300}}, "at least one patch"),
        ({"vision_config": {"vision_use_head": False}}, "expected the pooling head"),
    ],
)
def test_bad_configs_are_refused_in_one_line(config: dict[str, Any], what: str) -> None:
    with pytest.raises(InputRefused) as caught:
        graphs({"model_type": "siglip", **config})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("tokenizer_config.json", lambda c: c.update(pad_token="<none>"), "pad_token '<none>'"),
        ("tokenizer.json", lambda c: c.update(post_processor=None), "the last is the end token 1"),
        ("tokenizer.json", lambda c: c.update(model=BPE), "SigLIP 2, which"),
        ("config.json", lambda c: c["text_config"].update(vocab_size=99), "a vocabulary of 99"),
        (
            "preprocessor_config.json",
            lambda c: c.update(image_processor_type="CLIPImageProcessor"),
            "expected SiglipImageProcessor's",
        ),
        ("preprocessor_config.json", lambda c: c.update(size=38), "the shortest edge"),
        (
            "preprocessor_config.json",
            lambda c: c.update(size={"height": 30, "width": 38}),
            f"takes {SIDE} x {SIDE} pixels",
        ),
    ],
)
def test_bad_folders_are_refused_in_one_line(
    folder: Path, tmp_path: Path, name: str, edit: Callable[[Any], None], what: str
) -> None:
    with pytest.raises(InputRefused) as caught:
        open_preparer(changed(folder, tmp_path, name, edit))
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_sentencepiece_model_alone_is_told_what_to_take(
    folder: Path, tmp_path: Path
) -> None:
    copy, out = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "out"
    (copy / "tokenizer.json").rename(copy / "spiece.model")
    out.mkdir()
    with pytest.raises(InputRefused, match="no tokenizer.json.*google/siglip-base-patch16-224"):
        merge_adapters(copy, [], out)


def test_texts_are_brought_to_their_plain_form() -> None:
    assert canonical_text("  CT/MRI:\t<5 mm>, O'Brien's\n") == "ctmri 5 mm obriens"
    assert canonical_text("CT, now", lower=False) == "CT now"
    # Letters that Python and other languages put in lower case differently; no sign of ASCII.
    assert canonical_text("ΣΟΦΟΣ – ▁µ") == "σοφος – µ"


def test_texts_have_one_length_and_their_padding_is_the_end_token(folder: Path) -> None:
    found = open_preparer(folder).texts(["right lobe of the liver " * 30, "CT"])
    assert found.keys() == {"input_ids"}
    ids = found["input_ids"]
    assert ids.shape == (2, LENGTH) and ids.dtype == np.int64
    assert ids[0, -1] == 1 and (ids[0, :-1] != 1).all()
    assert ids[1].tolist() == TOKENS["CT"]
    with pytest.raises(InputRefused, match="no text was given"):
        open_preparer(folder).texts([])


def test_a_special_token_in_a_text_is_text(folder: Path) -> None:
    names = [piece for piece, _ in RECORDED["pieces"]]
    ids = open_preparer(folder).texts(["ct </s> liver"])["input_ids"][0].tolist()
    assert "".join(names[i] for i in ids if i != 1) == "▁ct▁s▁liver"


def test_a_shorter_tokenizer_counts_before_the_positions(folder: Path, tmp_path: Path) -> None:
    short = changed(
        folder, tmp_path, "tokenizer_config.json", lambda c: c.update(model_max_length=9)
    )
    assert open_preparer(short).texts(["CT"])["input_ids"].shape == (1, 9)


def test_an_image_settings_file_without_a_filter_is_bicubic(folder: Path, tmp_path: Path) -> None:
    bare = changed(folder, tmp_path, "preprocessor_config.json", lambda c: c.pop("resample"))
    pictures = [noise(64, 40)]
    same, other = (open_preparer(f).images(pictures)["pixel_values"] for f in (folder, bare))
    np.testing.assert_array_equal(same, other)


def test_scores_are_those_of_the_real_class(folder: Path, exported: Path) -> None:
    """Each pair by itself: the sigmoid of logits_per_image, whatever stands beside it."""
    model = ZeroShot(OrtGraphs(exported, threads=1))
    real = SiglipModel.from_pretrained(folder, dtype=torch.float32).eval()
    images, texts = pictures(3), [f"a photo of {label}" for label in LABELS]
    preparer = open_preparer(folder)
    feed = {**preparer.images(images), **preparer.texts(texts)}
    with torch.inference_mode():
        logits = real(**{k: torch.from_numpy(v) for k, v in feed.items()}).logits_per_image
    expected = torch.sigmoid(logits.double()).numpy()
    found = model.scores(images, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(model.scores(images, LABELS[:1]), found[:, :1], rtol=1e-6)
    assert model.logit_bias == pytest.approx(real.logit_bias.item(), rel=1e-6)
    assert np.ptp(expected) > 0.05


def test_padding_is_seen(folder: Path, exported: Path) -> None:
    """Fewer end tokens behind a text give another vector, as they do in torch."""
    graphs_ = OrtGraphs(exported, threads=1)
    ids = open_preparer(folder).texts(["CT of the liver"])["input_ids"]
    whole, half = (
        graphs_.run(TEXT_GRAPH, {"input_ids": i})["text_embeds"] for i in (ids, ids[:, :12])
    )
    assert np.abs(whole - half).max() > 0.1 * np.abs(whole).max()


def test_a_quantized_pooling_head_is_taken_apart_exactly(folder: Path, tmp_path: Path) -> None:
    """The fused matrix of queries, keys and values is packed whole, and used in two parts."""
    merged, packed, out = (tmp_path / name for name in ("merged", "packed", "out"))
    for path in (merged, packed, out):
        path.mkdir()
    merge_adapters(folder, [], merged)
    quantize_model(merged, packed, find_scheme("int8"), threads=1)
    layers = json.loads((packed / "quantization.json").read_text())["layers"]
    named = {layer["name"]: layer for layer in layers}
    assert named["vision_model.head.attention.in_proj_weight"]["kind"] != "float"
    assert named["text_model.head.weight"]["kind"] != "float"
    export_model(packed, out, float_storage="float16", accuracy_level=4)
    scores = ZeroShot(OrtGraphs(out / "model", threads=1)).scores(pictures(2), LABELS)
    assert ((scores > 0) & (scores < 1)).all()


def test_an_answer_says_that_labels_stand_alone(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    noise(60, 40).save(path)
    found = answer(exported, "zero-shot", Question((path,), LABELS), threads=1)
    assert found["scoring"] == "each label by itself"
    assert found["template"] == "a photo of {}"
    scores = found["results"][0]["scores"]
    show("zero-shot", found)
    shown = capsys.readouterr().out
    first = max(scores, key=lambda label: scores[label])
    assert shown.startswith(f"{first} {100 * scores[first]:.3g}%, ")
    assert shown.endswith("(each label scored by itself: these probabilities do not add up to 1)\n")
