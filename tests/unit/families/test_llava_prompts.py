"""LLaVA's prompts against transformers' processors, with one tokenizer and its own templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from exporter.core.errors import InputRefused
from exporter.families.captioners.llava import open_preparer
from exporter.families.layouts.llava_med import LLAVA_MED_TEMPLATE
from tests.support.tiny_llava import (
    GRID,
    MISTRAL_TEMPLATE,
    TEMPLATE,
    TILE,
    TOKENS,
    write_tiny_llava,
    write_tiny_llava_med,
)

PROMPT = "Describe this medical image."
SIZES = [(64, 64), (97, 31), (13, 77)]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def edited(folder: Path, name: str, **values: Any) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, **values}))


def settings(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
    return {k: v for k, v in raw.items() if k not in ("image_processor_type", "processor_class")}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("next"), kind="llava_next", decoder="mistral")


@pytest.fixture
def changed(llava: Path, tmp_path: Path) -> Path:
    for file in llava.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def processed(processor: Any, template: str, images: list[Image.Image], prompt: str) -> Any:
    content = [*([{"type": "image"}] * len(images)), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True
    )
    return processor(images=images, text=text, return_tensors="np")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompt", [PROMPT, "", "Zwei\n\nZeilen: äöü, 19 mm"])
def test_llava_equals_transformers(llava: Path, count: int, prompt: str) -> None:
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**settings(llava)),
        AutoTokenizer.from_pretrained(llava),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    images = [picture(*s) for s in SIZES[:count]]
    expected = processed(processor, TEMPLATE, images, prompt)
    found = open_preparer(llava).prepare(images, prompt)
    assert np.array_equal(found.input_ids, expected["input_ids"][0])
    assert np.array_equal(found.pixel_values, expected["pixel_values"])
    assert found.sizes == tuple((h, w) for w, h in SIZES[:count])


@pytest.mark.parametrize("size", [*SIZES, (300, 280), (32, 32), (31, 97)])
def test_anyres_equals_transformers(anyres: Path, size: tuple[int, int]) -> None:
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**settings(anyres)),
        AutoTokenizer.from_pretrained(anyres),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    expected = processed(processor, MISTRAL_TEMPLATE, [picture(*size)], PROMPT)
    found = open_preparer(anyres).prepare([picture(*size)], PROMPT)
    assert np.array_equal(found.input_ids, expected["input_ids"][0])
    assert np.array_equal(found.pixel_values, expected["pixel_values"][0])
    assert found.sizes == (tuple(expected["image_sizes"][0]),)
    index = found.vision[0]["feature_index"]
    assert len(index) == (found.input_ids == open_preparer(anyres).image_token_id).sum()


def test_llava_med_places_images_as_the_original_code(tmp_path: Path) -> None:
    folder = write_tiny_llava_med(tmp_path)
    (folder / "chat_template.jinja").write_text(LLAVA_MED_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = open_preparer(folder).prepare([picture(*s) for s in SIZES[:2]], PROMPT)
    # tokenizer_image_token: each piece is tokenized with <s>, which is kept in front only.
    pieces = f"[INST] <image>\n<image>\n{PROMPT} [/INST]".split("<image>")
    first, *later = (tokenizer(piece).input_ids for piece in pieces)
    expected = list(first)
    for ids in later:
        assert ids[0] == tokenizer.bos_token_id
        expected += [-200, *ids[1:]]
    places = found.input_ids == 0
    assert places.sum() == 2 * TOKENS
    assert found.input_ids[~places].tolist() == [i for i in expected if i != -200]
    starts = np.flatnonzero(np.diff(np.concatenate([[0], places.astype(int)])) == 1)
    assert len(starts) == 2
    assert starts[0] == expected.index(-200)


def test_an_image_marker_in_the_prompt_is_refused(llava: Path) -> None:
    with pytest.raises(InputRefused, match="contains the image marker <image>"):
        open_preparer(llava).prepare([picture(40, 40)], "what is <image>?")


def test_a_prompt_without_room_to_answer_is_refused(anyres: Path) -> None:
    preparer = open_preparer(anyres)
    with pytest.raises(InputRefused, match="positions, the model has 640; shorten the prompt"):
        preparer.prepare([picture(300, 280)] * 3, PROMPT)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 32}}, "tower takes 32"),
        ("preprocessor_config.json", {"do_center_crop": False}, "images become of any size"),
        ("processor_config.json", {"patch_size": 14}, "patch_size is 14"),
        (
            "processor_config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full'",
        ),
        ("config.json", {"image_token_index": 5}, "config.json says 5"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_files_that_disagree_are_refused(
    changed: Path, name: str, values: dict[str, Any], words: str
) -> None:
    edited(changed, name, **values)
    with pytest.raises(InputRefused, match=words):
        open_preparer(changed)


def test_an_image_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    edited(folder, "config.json", image_token_index=32000)
    with pytest.raises(InputRefused, match="config.json says 32000 in a vocabulary"):
        open_preparer(folder)


@pytest.mark.parametrize("grid", [[[TILE, TILE]], [g for g in GRID if g != [64, 64]]])
def test_grids_that_disagree_are_refused(tmp_path: Path, grid: list[list[int]]) -> None:
    folder = write_tiny_llava(tmp_path, kind="llava_next")
    edited(folder, "preprocessor_config.json", image_grid_pinpoints=grid)
    with pytest.raises(InputRefused, match=r"config\.json has 32 in"):
        open_preparer(folder)
