"""Small files of a model folder: dangerous keys, damaged JSON, copying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.core import modelfiles
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import SMALL_FILES, copy_small_files, read_config, read_json


def write(folder: Path, value: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    "config",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
        {"text_config": {"auto_map": {"AutoConfig": "x.Y"}}},
        {"layers": [{"deep": [{"trust_remote_code": True}]}]},
        {"megatron_core": "evil.core"},
        {"megatron_config": {}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.x"}},
        {
            "auto_mapping": {
                "base_model_class": "os;x",
                "parent_library": "transformers.models.llama.modeling_llama",
            }
        },
        {
            "auto_mapping": {
                "base_model_class": "X",
                "parent_library": "transformers.models.llama.modeling_llama",
                "more": 1,
            }
        },
    ],
)
def test_a_key_that_can_run_code_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="can make a loader run code"):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": None, "megatron_core": "megatron.core", "megatron_config": None},
        {"trust_remote_code": False},
        {
            "auto_mapping": {
                "base_model_class": "Idefics3ForConditionalGeneration",
                "parent_library": "transformers.models.idefics3.modeling_idefics3",
            }
        },
    ],
)
def test_what_peft_writes_itself_passes(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_config(write(tmp_path, config)) == config


LOCAL = {"AutoModelForCausalLM": "hf_moondream.HfMoondream"}


def test_the_name_of_code_that_is_never_run_is_left_out(tmp_path: Path) -> None:
    config = {"model_type": "moondream1", "auto_map": LOCAL}
    assert read_config(write(tmp_path, config), ("moondream1",)) == {"model_type": "moondream1"}
    with pytest.raises(InputRefused, match="auto_map"):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "idefics3", "auto_map": LOCAL},
        {"model_type": "moondream1", "auto_map": {"AutoModel": "evil/repository--hub.Model"}},
        {"model_type": "moondream1", "auto_map": {"AutoModel": ["hub.Model", None]}},
        {"model_type": "moondream1", "auto_map": "hub.Model"},
        {"model_type": "moondream1", "config": {"auto_map": LOCAL}},
    ],
)
def test_code_from_elsewhere_is_refused_for_them_too(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(InputRefused, match="auto_map"):
        read_config(write(tmp_path, config), ("moondream1",))


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", "{", '{"a": NaN}', '{"a": -Infinity}'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputRefused, match=r"config\.json"):
        read_json(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(InputRefused, match="not JSON"):
        read_json(path)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def test_deep_nesting_is_read_or_refused_never_a_crash(tmp_path: Path) -> None:
    outcomes = set()
    for depth in range(800, 1010, 5):
        path = write(tmp_path, nested(depth))
        try:
            read_config(path)
            outcomes.add("read")
        except InputRefused:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    with pytest.raises(InputRefused, match="not JSON"):
        read_config(write(tmp_path, nested(100_000)))


def test_a_missing_or_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputRefused, match="no such file"):
        read_json(tmp_path / "config.json")
    path = write(tmp_path, {"a": "b" * 100})
    monkeypatch.setattr(modelfiles, "MAX_JSON", 50)
    with pytest.raises(InputRefused, match="at most 50"):
        read_json(path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match="at most 50"):
        copy_small_files(tmp_path, tmp_path / "out")


def test_copies_only_small_files_and_follows_links(tmp_path: Path) -> None:
    source, target, blobs = (tmp_path / n for n in ("source", "target", "blobs"))
    for folder in (source, target, blobs):
        folder.mkdir()
    (blobs / "abc").write_text("{}")
    (source / "tokenizer.json").symlink_to(blobs / "abc")
    (source / "config.json").write_text('{"a": 1}')
    (source / "modeling_evil.py").write_text("boom")
    (source / "pytorch_model.bin").write_text("boom")
    (source / "vocab.json").mkdir()
    assert copy_small_files(source, target) == ["config.json", "tokenizer.json"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()
    assert len(set(SMALL_FILES)) == len(SMALL_FILES)
