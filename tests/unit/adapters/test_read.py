"""Reading adapters: what is accepted, and what is refused with a reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.adapters.read import read_adapter
from exporter.core.digest import sha256_file
from exporter.core.errors import InputRefused
from tests.unit.adapters.synthetic import lora_arrays, write_lora


def test_reads_settings_and_digests(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "a", use_rslora=True, lora_alpha=3, r=4)
    adapter = read_adapter(folder)
    assert adapter.name == "a"
    assert adapter.config.scaling(3.0, 4) == 1.5
    assert adapter.weights_sha256 == sha256_file(folder / "adapter_model.safetensors")
    assert adapter.tensors.tensors.keys() == lora_arrays().keys()


def test_settings_of_a_newer_peft_that_are_off_are_ignored(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, use_new_thing=False, new_config=None, new_map={}, new_list=[])
    assert read_adapter(folder).config.r == 2


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"init_lora_weights": "olora"}, "changed the base weights"),
        ({"init_lora_weights": "loftq"}, "changed the base weights"),
        ({"init_lora_weights": "corda"}, "changed the base weights"),
        ({"init_lora_weights": "lora_ga"}, "changed the base weights"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is set"),
        ({"alora_invocation_tokens": [5]}, "'alora_invocation_tokens' is set"),
        ({"use_qalora": True}, "'use_qalora' is set"),
        ({"target_parameters": ["x"]}, "'target_parameters' is set"),
        ({"use_new_thing": True}, "'use_new_thing' is set"),
        ({"auto_mapping": {"parent_library": "evil"}}, "can make a loader run code"),
        ({"megatron_core": "evil"}, "can make a loader run code"),
        ({"r": "8"}, r"Expected `int`.*\$\.r"),
        ({"r": 0}, "expected 1 to"),
        ({"rank_pattern": {"q_proj": -1}}, "expected 1 to"),
        ({"bias": "some"}, r"\$\.bias"),
        ({"use_dora": True, "lora_bias": True}, "use_dora together with lora_bias"),
        ({"rank_pattern": {"(a+)+b": 3}}, "take very long"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
        ({"exclude_modules": "(x|x)*y"}, "take very long"),
        ({"layers_pattern": ["("]}, "not a regular expression"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(
    tmp_path: Path, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputRefused, match=match):
        read_adapter(write_lora(tmp_path, **config))


def test_an_infinite_alpha_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type":"LORA","r":2,"lora_alpha":1e999}')
    with pytest.raises(InputRefused, match="lora_alpha"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_is_refused_by_name_and_by_content(tmp_path: Path, name: str) -> None:
    folder = write_lora(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputRefused, match="pickle"):
        read_adapter(folder)


def test_missing_empty_and_odd_weights_are_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "a", arrays={})
    with pytest.raises(InputRefused, match="no tensors"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputRefused, match="no such file"):
        read_adapter(folder)
    integers = {"base_model.model.x.lora_A.weight": np.ones((2, 2), np.int32)}
    with pytest.raises(InputRefused, match="I32; expected floating point"):
        read_adapter(write_lora(tmp_path / "b", arrays=integers))
    with pytest.raises(InputRefused, match="no such file"):
        read_adapter(tmp_path / "nowhere")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputRefused, match="truncated"):
        read_adapter(folder)


def test_config_without_weights_config_is_json(tmp_path: Path) -> None:
    folder = write_lora(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(InputRefused, match="expected a JSON object"):
        read_adapter(folder)
