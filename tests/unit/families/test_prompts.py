"""Prompt tokens against transformers' tokenizer and the processors' own expansion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.captioners.idefics3 import open_preparer
from exporter.families.prompts.idefics3 import image_text
from tests.support.tiny import write_tiny_model, write_tokenizer

PROMPT = "Describe this medical image."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def expansion_of_transformers(rows: int, cols: int, tokens: int) -> str:
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    processor = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_tag="<global-img>",
        image_seq_len=tokens,
    )
    inputs = {"rows": [[rows]], "cols": [[cols]]}
    text: str = Idefics3Processor.replace_image_token(processor, inputs, 0)
    return text


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 2), (2, 1), (4, 3), (8, 8)])
def test_expansion_equals_both_processors(rows: int, cols: int) -> None:
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    ours = image_text(rows, cols, 5)
    assert ours == expansion_of_transformers(rows, cols, 5)
    assert ours == get_image_prompt_string(
        rows, cols, 5, "<fake_token_around_image>", "<image>", "<global-img>"
    )


@pytest.mark.parametrize("row_col_tokens", [True, False])
@pytest.mark.parametrize("sizes", [[(70, 45)], [(20, 20)], [(200, 30), (33, 64)], []])
@pytest.mark.parametrize("prompt", [PROMPT, "", "Größe: 19 mm?\n\n  {{ x }}\t<b>"])
def test_tokens_and_pixels_equal_transformers(
    copy: Path, row_col_tokens: bool, sizes: list[tuple[int, int]], prompt: str
) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    if not row_col_tokens:
        vocabulary = write_tokenizer(copy, row_col_tokens=False)
        config = json.loads((copy / "config.json").read_text())
        edit(
            copy / "config.json",
            image_token_id=vocabulary["<image>"],
            text_config=config["text_config"],
        )
        edit(copy / "generation_config.json", eos_token_id=vocabulary["<end_of_utterance>"])
    images = [picture(*size) for size in sizes]
    ours = open_preparer(copy).prepare(images, prompt)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    template = json.loads((copy / "chat_template.json").read_text())["chat_template"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    if images:
        processor = Idefics3ImageProcessorPil.from_pretrained(copy)
        out = processor([images], return_row_col_info=True, return_tensors="np")
        for rows, cols in zip(out["rows"][0], out["cols"][0], strict=True):
            text = text.replace(
                "<image>", expansion_of_transformers(rows, cols, 4).replace("<image>", "\0"), 1
            )
        assert np.array_equal(ours.pixel_values, out["pixel_values"][0])
    else:
        assert ours.vision == ()
    assert ours.input_ids.tolist() == tokenizer(text.replace("\0", "<image>"))["input_ids"]


def test_text_of_tokens_equals_transformers(model: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    preparer = open_preparer(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokens = tokenizer(" no pneumothorax , 19 mm äöü\n")["input_ids"] + [tokenizer.eos_token_id]
    assert preparer.decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "marker", ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_2>"]
)
def test_image_markers_in_the_prompt_are_refused(model: Path, marker: str) -> None:
    with pytest.raises(InputRefused, match=marker):
        open_preparer(model).prepare([picture(40, 40)], f"What is {marker}?")


def test_marker_that_the_template_assembles_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("<ima{{ messages[0].content[1].text }}<image>")
    with pytest.raises(InputRefused, match="2 image markers for 1 images"):
        open_preparer(copy).prepare([picture(40, 40)], "ge>")


def test_prompt_that_fills_the_context_is_refused(model: Path) -> None:
    with pytest.raises(InputRefused, match="positions, the model has 512"):
        open_preparer(model).prepare([picture(40, 40)], "x9 " * 400)


def test_beginning_token_is_not_added_twice(copy: Path) -> None:
    path = copy / "tokenizer.json"
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            start,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    edit(path, post_processor=processor)
    ids = open_preparer(copy).prepare([], "Hi").input_ids.tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
    (copy / "chat_template.jinja").write_text("Hi")
    assert open_preparer(copy).prepare([], "x").input_ids[0] == 1


def test_stop_ids_come_from_generation_config_and_the_end_of_utterance(copy: Path) -> None:
    end = json.loads((copy / "generation_config.json").read_text())["eos_token_id"]
    assert open_preparer(copy).generation.stop_ids == {end}
    edit(copy / "generation_config.json", eos_token_id=[2, 0])
    assert open_preparer(copy).generation.stop_ids == {0, 2, end}
    (copy / "generation_config.json").unlink()
    assert open_preparer(copy).generation.stop_ids == {end}
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputRefused, match="eos_token_id is 'x'"):
        open_preparer(copy)


def test_settings_nested_in_processor_config_are_read(copy: Path) -> None:
    raw = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    edit(copy / "processor_config.json", image_processor=raw | {"do_image_splitting": False})
    assert len(open_preparer(copy).prepare([picture(70, 45)], PROMPT).pixel_values) == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor_config.json", {"image_seq_len": 169}, "image_seq_len is 169"),
        ("config.json", {"image_token_id": 7}, "config.json says 7"),
        (
            "preprocessor_config.json",
            {"max_image_size": {"longest_edge": 64}},
            "tiles of 64 pixels",
        ),
        ("preprocessor_config.json", {"size": 3}, "bad image settings"),
        ("tokenizer.json", {"model": 5}, "not a tokenizer"),
        ("tokenizer.json", {"added_tokens": []}, "'<image>' is token None"),
        ("chat_template.json", {"chat_template": None}, "no chat template"),
        ("config.json", {"auto_map": {"AutoModel": "x.py"}}, "can make a loader run code"),
    ],
)
def test_files_that_disagree_are_refused(
    copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(InputRefused, match=message):
        open_preparer(copy)


def test_tokenizer_larger_than_the_vocabulary_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", text_config=config["text_config"] | {"vocab_size": 300})
    with pytest.raises(InputRefused, match="different models"):
        open_preparer(copy).prepare([picture(40, 40)], PROMPT)
