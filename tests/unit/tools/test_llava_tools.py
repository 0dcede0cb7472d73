"""The LLaVA demo's training sees what transformers would show it, and stores names as published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.calibrate.phantoms.samples import draw_phantoms
from exporter.calibrate.phantoms.scene import REGIONS, SIZES_MM
from tools.llava_files import prompt_text, write_model_files

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tools.llava_data import DEVICES, FINDINGS, LABELS, Data, draw_chunk  # noqa: E402
from tools.train_llava import Tokens, new_model, published_name, save_float16  # noqa: E402

PUBLISHED = (
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.lm_head.weight",
    "multi_modal_projector.linear_2.bias",
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.encoder.layers.4.mlp.fc1.weight",
    "vision_tower.vision_model.pre_layrnorm.weight",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    write_model_files(path, [p.caption for p in draw_phantoms("train", 60, 4)], 700)
    return path


def test_pictures_and_prompt_are_those_of_the_processor(folder: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    phantom = next(draw_phantoms("train", 1, 1))
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == prompt_text(1)
    inputs = processor(images=Image.fromarray(phantom.pixels), text=text, return_tensors="np")
    assert inputs["input_ids"][0].tolist() == Tokens(folder).prompt
    picture, labels, caption = draw_chunk(("train", 0, 1))[0]
    data = Data(picture[None], np.array([labels]), [caption])
    np.testing.assert_allclose(data.pixels([0]).numpy(), inputs["pixel_values"], atol=1e-6)


def test_a_caption_survives_its_tokens(folder: Path) -> None:
    tokens = Tokens(folder)
    for phantom in draw_phantoms("dev", 4, 4):
        ids = tokens.encode(phantom.caption)
        assert ids[-1] == 2
        assert tokens.decode(ids) == phantom.caption


def test_labels_say_what_the_caption_says() -> None:
    names, asked = list(LABELS), 0
    for _, labels, written in draw_chunk(("dev", 0, 20)):
        row, caption = dict(zip(names, labels, strict=True)), written.lower()
        assert all(-1 <= row[n] < LABELS[n] for n in names)
        assert REGIONS[row["region"]].anatomy in caption
        assert (row["device"] > 0) == any(d in caption for d in DEVICES)
        for group in (0, 1):
            if row[f"finding {group}"]:
                assert FINDINGS[row[f"finding {group}"] - 1] in caption
            if row[f"size {group}"] >= 0:
                asked += 1
                assert f"{SIZES_MM[row[f'size {group}']]} mm" in caption
    assert asked > 10


def test_stored_weights_are_the_model_that_was_trained(folder: Path) -> None:
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    trained = new_model(config)
    save_float16(trained, config, folder)
    with safe_open(folder / "model.safetensors", "np") as stored:
        assert set(PUBLISHED) <= set(stored.keys())
    kind = transformers.LlavaForConditionalGeneration
    whole = kind.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(parameter.half().float())
        inputs = {
            "input_ids": torch.tensor([Tokens(folder).prompt]),
            "pixel_values": torch.randn(1, 3, 112, 112),
        }
        np.testing.assert_allclose(trained(**inputs).logits, whole(**inputs).logits, atol=1e-4)


def test_a_foreign_tensor_has_no_published_name() -> None:
    with pytest.raises(ValueError, match="not a tensor"):
        published_name("heads.norm.weight")
