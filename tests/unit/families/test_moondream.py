"""Moondream2: crops, prompt tokens, the published layout both ways, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from exporter.adapters.keys import parse_key
from exporter.adapters.merge import merge_adapters
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.moondream import (
    PUBLISHED,
    decoder_spec,
    open_preparer,
    tower_spec,
)
from exporter.families.checkpoints import layout_of
from exporter.families.images.overlap_crops import (
    CropSettings,
    averages,
    crop_image,
    stitch_index,
    tiling,
)
from exporter.families.layouts.moondream import OLDER_NAMES, check_code, moondream_config
from tests.support.tiny_moondream import ROWS, START, write_tiny_moondream

PUBLISHED_CONFIG = {
    "architectures": ["HfMoondream"],
    "model_type": "moondream1",
    "config": {},
    "torch_dtype": "bfloat16",
}
# moondream/torch/config.py as published: 2025-01-09, 2025-03-27 and 2025-06-21.
CODE = """
from dataclasses import dataclass, field
@dataclass(frozen=True)
class TokenizerConfig:
    bos_id: int = {start}
    eos_id: int = {start}{more}
    templates: Dict[str, Optional[Dict[str, List[int]]]] = field(
        default_factory=lambda: {{
            "caption": {caption},
            "query": {{"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]}},
            "detect": {{"prefix": [198, 198, 47504, 25], "suffix": [628]}},
            "point": {{"prefix": [198, 198, 12727, 25], "suffix": [628]}},
        }}
    )
"""
CAPTION = '"short": [198, 198, 16438, 8305, 25], "normal": [198, 198, 24334, 1159, 25]'
SETTINGS = CropSettings(378, 14, 4, 12)
# Read in the published loader.
KNOWN = {
    "text_model.transformer.embd.wte.weight": "model.text.wte",
    "text_model.transformer.h.23.ln.bias": "model.text.blocks.23.ln.bias",
    "text_model.transformer.h.0.mixer.Wqkv.weight": "model.text.blocks.0.attn.qkv.weight",
    "text_model.transformer.h.7.mixer.out_proj.bias": "model.text.blocks.7.attn.proj.bias",
    "text_model.transformer.h.7.mlp.fc1.weight": "model.text.blocks.7.mlp.fc1.weight",
    "text_model.lm_head.ln.weight": "model.text.post_ln.weight",
    "text_model.lm_head.linear.bias": "model.text.lm_head.bias",
    "vision_encoder.encoder.model.visual.patch_embed.linear.weight": "model.vision.patch_emb.weight",
    "vision_encoder.encoder.model.visual.pos_embed": "model.vision.pos_emb",
    "vision_encoder.encoder.model.visual.blocks.26.norm2.weight": "model.vision.blocks.26.ln2.weight",
    "vision_encoder.encoder.model.visual.blocks.26.attn.qkv.bias": (
        "model.vision.blocks.26.attn.qkv.bias"
    ),
    "vision_encoder.encoder.model.visual.norm.weight": "model.vision.post_ln.weight",
    "vision_encoder.projection.mlp.fc2.weight": "model.vision.proj_mlp.fc2.weight",
    "region_model.coordinate_decoder.fc1.bias": "model.region.coord_decoder.fc1.bias",
    "region_model.size_encoder.weight": "model.region.size_encoder.weight",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moondream(tmp_path_factory.mktemp("moondream"))


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((200, 150), (1, 1)),  # smaller than a crop
        ((378, 378), (1, 1)),
        ((600, 800), (2, 4)),  # area left of the margins: 488 x 688, windows of 266
        ((1000, 1000), (3, 3)),
        ((4000, 500), (9, 1)),  # 15 x 2 would cover it: times sqrt(12 / 30)
        ((5000, 5000), (3, 3)),
        ((3000, 1000), (5, 2)),  # 11 x 4 would cover it: times sqrt(12 / 44)
    ],
)
def test_tilings(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """(height, width) in pixels; worked out by hand from the rule."""
    height, width = (edge - 2 * 4 * 14 for edge in size)
    assert tiling(height, width, 19 * 14, 12) == expected
    assert expected[0] * expected[1] <= 12


def test_crops_are_cuts_of_the_resized_image() -> None:
    image = picture(800, 600)
    pixels, (rows, columns) = crop_image(image, SETTINGS)
    assert (rows, columns) == (2, 4)
    assert pixels.shape == (9, 3, 378, 378)
    step, border = 266, 112
    large = image.resize((columns * step + border, rows * step + border), Image.Resampling.LANCZOS)
    cut = np.asarray(large)[step : step + 378, 2 * step : 2 * step + 378]
    whole = np.asarray(image.resize((378, 378), Image.Resampling.LANCZOS))
    for found, values in ((pixels[0], whole), (pixels[1 + 1 * columns + 2], cut)):
        expected = (values.astype(np.float64) / 255 - 0.5) / 0.5
        assert np.abs(found.transpose(1, 2, 0) - expected).max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 1), (1, 12)])
def test_each_place_comes_from_the_crop_whose_window_it_is_in(shape: tuple[int, int]) -> None:
    """A picture whose values are its own coordinates: joining its crops gives it back."""
    rows, columns = shape
    grid, window = SETTINGS.grid, SETTINGS.window
    size = (rows * window + 8, columns * window + 8)
    whole = np.arange(size[0] * size[1]).reshape(size)
    crops = [np.full((grid, grid), -1)]
    crops += [
        whole[r * window : r * window + grid, c * window : c * window + grid]
        for r in range(rows)
        for c in range(columns)
    ]
    index = stitch_index(SETTINGS, rows, columns)
    assert np.array_equal(np.concatenate([c.reshape(-1) for c in crops])[index], whole)
    # A crop's margins are dropped where there is a neighbour.
    owner = index // grid**2 - 1
    inner = owner[4:-4, 4:-4].reshape(rows, window, columns, window)
    assert (inner == np.arange(rows * columns).reshape(rows, 1, columns, 1)).all()


@pytest.mark.parametrize("size", [27, 46, 65, 236])
def test_averages_are_torchs(size: int) -> None:
    values = np.random.default_rng(size).standard_normal((1, 1, size, 27)).astype(np.float32)
    expected = adaptive_avg_pool2d(torch.from_numpy(values), (27, 27)).numpy()[0, 0]
    assert np.abs(averages(size, 27) @ values[0, 0] - expected).max() < 1e-6


def test_the_prompt_is_lists_of_tokens_around_the_question(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    tokens = config["config"]["tokenizer"]
    preparer = open_preparer(base)
    inputs = preparer.prepare([picture(60, 40)], "What is it?")
    question = preparer.tokenizer.encode("What is it?").ids
    query = tokens["templates"]["query"]
    image = [config["config"]["text"]["vocab_size"] - 1] * ROWS
    expected = [tokens["bos_id"], *image, *query["prefix"], *question, *query["suffix"]]
    assert inputs.input_ids.tolist() == expected
    assert inputs.prefix_length == 1 + ROWS
    assert preparer.generation.stop_ids == {tokens["eos_id"]}
    assert preparer.tokenizer.token_to_id(START) == tokens["bos_id"]


def test_later_revisions_put_a_space_before_the_question(tmp_path: Path) -> None:
    write_tiny_moondream(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["config"]["tokenizer"]["templates"]["caption"]["long"] = [1, 2]
    path.write_text(json.dumps(config))
    preparer = open_preparer(tmp_path)
    ids = preparer.prepare([picture(60, 40)], "What").input_ids.tolist()
    spaced = preparer.tokenizer.encode(" What").ids
    assert spaced != preparer.tokenizer.encode("What").ids
    behind = 1 + ROWS + len(preparer.before)
    assert ids[behind : behind + len(spaced)] == spaced


@pytest.mark.parametrize("count", [0, 2])
def test_one_image_a_prompt(base: Path, count: int) -> None:
    with pytest.raises(InputRefused, match=f"{count} images; Moondream takes one"):
        open_preparer(base).prepare([picture(60, 40)] * count, "What?")


def test_the_published_sizes() -> None:
    decoder, tower = decoder_spec(PUBLISHED_CONFIG), tower_spec(PUBLISHED_CONFIG)
    assert (decoder.layers, decoder.heads, decoder.rotary_dim) == (24, 32, 32)
    assert (decoder.prefix_length, decoder.max_positions) == (730, 2048)
    tensors = [t for t in [*decoder.tensors(), *tower.tensors()] if t.used]
    assert sum(int(np.prod(t.shape)) for t in tensors) == 1866919792
    assert moondream_config(PUBLISHED_CONFIG)["prompt_config"] == {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "query_prefix": [198, 198, 24361, 25],
        "query_suffix": [198, 198, 33706, 25],
        "space_before_question": False,
    }


def test_known_names_both_ways() -> None:
    names = PUBLISHED["moondream1"].names
    assert {old: names.newest(old) for old in KNOWN} == KNOWN
    assert {names.published(new): new for new in KNOWN.values()} == KNOWN


def test_a_checkpoint_goes_to_the_older_names_and_back(base: Path) -> None:
    names = PUBLISHED["moondream1"].names
    stored = Checkpoint.open(base)
    older = stored.renamed(names.published)
    prefixes = ("text_model.", "vision_encoder.", "region_model.", "model.region.")
    assert all(name.startswith(prefixes) for name in older.tensors)
    back = older.renamed(names.newest)
    assert back.tensors.keys() == stored.tensors.keys()
    assert all(np.array_equal(back.raw(n), stored.raw(n)) for n in stored.tensors)
    assert len({new for _, new in OLDER_NAMES}) == len(OLDER_NAMES)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.text.blocks.3.attn.qkv.lora_A.weight",
        "base_model.model.text.blocks.3.attn.qkv.lora_A.default.weight",
        "base_model.model.text_model.transformer.h.3.mixer.Wqkv.lora_A.weight",
        "text_model.transformer.h.3.mixer.Wqkv.lora_A.weight",
    ],
)
def test_adapter_keys_of_each_class(key: str) -> None:
    found = parse_key(key, layout_of({"model_type": "moondream1"}))
    assert (found.module, found.part) == ("model.text.blocks.3.attn.qkv", "lora_A")


def test_the_merged_folder_says_everything(base: Path, tmp_path: Path) -> None:
    merge_adapters(base, [], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MoondreamForConditionalGeneration"]
    assert decoder_spec(config) == decoder_spec(json.loads((base / "config.json").read_text()))
    expected = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    stored = Checkpoint.open(tmp_path).tensors
    assert {t.name: t.shape for t in expected} == {n: i.shape for n, i in stored.items()}
    assert open_preparer(tmp_path).before == open_preparer(base).before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Moondream"]}, "from 2024 cut images .* expected .*2025-01-09"),
        ({"config": {"tokenizer": {"answer_id": 3}}}, "from 2025-06 on are not known"),
        ({"config": {"text": {"group_size": 128}}}, "group_size is 128.*quantized"),
        ({"config": {"text": {"n_kv_heads": 8}}}, "n_kv_heads is 8; expected 32"),
        ({"config": {"text": {"prefix_attn": 577}}}, "prefix_attn is 577; expected 730"),
        ({"config": {"vision": {"proj_out_dim": 720}}}, "proj_out_dim is 720; expected 2048"),
        ({"config": {"tokenizer": {"templates": {"query": None}}}}, r"templates\.query is 'None'"),
        ({"config": {"text": 3}}, "expected objects"),
    ],
)
def test_other_revisions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message) as caught:
        moondream_config({**PUBLISHED_CONFIG, **change})
    assert "\n" not in str(caught.value)


def test_the_folders_own_code_is_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    check_code(tmp_path, PUBLISHED_CONFIG)
    path.write_text(
        "raise SystemExit('run')\n" + CODE.format(start=50256, more="", caption=f"{{{CAPTION}}}")
    )
    check_code(tmp_path, PUBLISHED_CONFIG)
    long = f'{{{CAPTION}, "long": [198, 198, 14617, 8305, 25]}}'
    path.write_text(CODE.format(start=50256, more="", caption=long))
    with pytest.raises(InputRefused, match=r"not those of revision 2025-01-09.*config\.tokenizer"):
        check_code(tmp_path, PUBLISHED_CONFIG)
    query = {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]}
    stated = {"tokenizer": {"templates": {"caption": {"long": [1]}, "query": query}}}
    check_code(tmp_path, {**PUBLISHED_CONFIG, "config": stated})
    path.write_text(CODE.format(start=0, more="\n    answer_id: int = 3", caption=long))
    with pytest.raises(InputRefused, match="from 2025-06 on are not known"):
        check_code(tmp_path, PUBLISHED_CONFIG)
    path.write_text("class Other: pass")
    with pytest.raises(InputRefused, match="no TokenizerConfig"):
        check_code(tmp_path, PUBLISHED_CONFIG)


def test_merging_compares_the_folders_code(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "copy")
    code = CODE.format(start=0, more="\n    answer_id: int = 3", caption="{}")
    (folder / "config.py").write_text(code)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match="2025-06"):
        merge_adapters(folder, [], tmp_path / "out")


def test_a_tokenizer_of_another_revision_is_refused(tmp_path: Path) -> None:
    write_tiny_moondream(tmp_path, bos_id=7)
    with pytest.raises(InputRefused, match="start token is 7; is it the tokenizer of another"):
        open_preparer(tmp_path)
