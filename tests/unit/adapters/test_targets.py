"""Resolving an adapter against a base: every way in which it may not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.adapters.base import open_base
from exporter.adapters.read import read_adapter
from exporter.adapters.targets import AdapterPlan, plan_adapter
from exporter.core.errors import InputRefused
from tests.unit.adapters.synthetic import (
    EMBEDDING,
    Arrays,
    Q,
    base_arrays,
    lora_arrays,
    write_base,
    write_lora,
)

P = "base_model.model."
Q0 = f"{P}{Q.format(0)}"


def plan(
    folder: Path, arrays: Arrays | None = None, base: Arrays | None = None, **config: Any
) -> AdapterPlan:
    opened = open_base(write_base(folder / "base", base))
    return plan_adapter(read_adapter(write_lora(folder / "lora", arrays, **config)), opened)


def changed(**changes: Any) -> Arrays:
    """The usual adapter with tensors added, replaced or (None) removed, by position after Q0."""
    arrays: dict[str, Any] = {**lora_arrays(), **changes}
    return {name: value for name, value in arrays.items() if value is not None}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_fitting_adapter(tmp_path: Path) -> None:
    found = plan(tmp_path, use_rslora=True, alpha_pattern={"layers.1.*q_proj": 8})
    by_name = {update.tensor: update for update in found.updates}
    assert by_name.keys() == {f"{Q.format(layer)}.weight" for layer in (0, 1)}
    assert by_name[f"{Q.format(0)}.weight"].scaling == 4 / np.sqrt(2)
    assert by_name[f"{Q.format(1)}.weight"].scaling == 8 / np.sqrt(2)
    assert found.replacements == ()


@pytest.mark.parametrize(
    ("arrays", "config", "match"),
    [
        (changed(**{f"{Q0}.lora_B.weight": None}), {}, r"no lora_B.*incomplete"),
        (changed(**{f"{Q0}.lora_A.weight": None}), {}, r"no lora_A.*incomplete"),
        ({k: v for k, v in lora_arrays().items() if "layers.0" in k}, {}, "1 of 2 targets have no"),
        (lora_arrays(), {"target_modules": ["q_proj", "embed_tokens"]}, "1 of 3 targets have no"),
        (lora_arrays(layers=3), {}, "does not have; is it an adapter for another base"),
        (lora_arrays(width=16), {}, "do not fit; is it an adapter for another base"),
        (lora_arrays(rank=4), {}, r"has rank 4, adapter_config\.json says 2"),
        (changed(**{f"{Q0}.lora_B.weight": zeros(8, 3)}), {}, "do not fit"),
        (changed(**{f"{Q0}.lora_A.weight": zeros(0, 8)}), {}, "do not fit"),
        (changed(**{f"{P}lm_head.weight": zeros(12, 8)}), {}, "unexpected key"),
        (changed(**{f"{P}model.x.bias": zeros(8)}), {"bias": "lora_only"}, "unexpected key"),
        (changed(**{f"{P}model.x.bias": zeros(8)}), {"bias": "all"}, "does not have"),
        (
            changed(**{f"{P}lm_head.weight": zeros(13, 8)}),
            {"modules_to_save": ["lm_head"]},
            r"is \[13, 8\].*vocabulary resized",
        ),
        (changed(**{f"{Q0}.lora_magnitude_vector": zeros(8)}), {}, "unexpected lora_magnitude"),
        (lora_arrays(), {"use_dora": True}, "no lora_magnitude_vector"),
        (changed(**{f"{Q0}.lora_B.bias": zeros(8)}), {}, "unexpected lora_B_bias"),
        (changed(**{f"{Q0}.lora_B.bias": zeros(8)}), {"lora_bias": True}, "does not have"),
        (changed(**{f"{Q0}.lora_A.default.weight": zeros(2, 8)}), {}, "are the same tensor"),
        (
            changed(**{f"{Q0}.lora_A.a.weight": zeros(2, 8), f"{Q0}.lora_B.b.weight": zeros(8, 2)}),
            {},
            "several adapters in one file",
        ),
        ({f"{P}lm_head.weight": zeros(12, 8)}, {"modules_to_save": ["lm_head"]}, "no LoRA tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: Arrays, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputRefused, match=match):
        plan(tmp_path, arrays, **config)


def test_a_layer_left_out_on_purpose_is_not_missing(tmp_path: Path) -> None:
    first = {k: v for k, v in lora_arrays().items() if "layers.0" in k}
    assert len(plan(tmp_path / "1", first, layers_to_transform=[0]).updates) == 1
    assert (
        len(plan(tmp_path / "2", first, layers_to_transform=0, layers_pattern="layers").updates)
        == 1
    )
    assert len(plan(tmp_path / "3", first, exclude_modules=r".*layers\.1.*").updates) == 1
    assert len(plan(tmp_path / "4", first, exclude_modules=[Q.format(1)]).updates) == 1
    with pytest.raises(InputRefused, match="targets have no"):
        plan(tmp_path / "5", first, layers_to_transform=[0, 1])


def test_weights_of_five_axes_are_refused(tmp_path: Path) -> None:
    name = "model.vision_model.patch.q_proj"
    arrays = {
        f"{P}{name}.lora_A.weight": zeros(2, 3, 2, 2, 2),
        f"{P}{name}.lora_B.weight": zeros(4, 2),
    }
    base = {
        EMBEDDING: zeros(12, 8),
        "lm_head.weight": zeros(12, 8),
        f"{name}.weight": zeros(4, 3, 2, 2, 2),
    }
    with pytest.raises(InputRefused, match="do not fit"):
        plan(tmp_path, arrays, base)


@pytest.mark.parametrize(
    ("arrays", "config", "match"),
    [
        ({}, {"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"x.qweight": np.ones((2, 2), np.int32)}, {}, "'x.qweight' is I32"),
        ({"x.weight": np.ones((2, 2), np.uint8)}, {}, "'x.weight' is U8"),
        ({"x.weight.absmax": zeros(2)}, {}, "absmax"),
        ({"x.SCB": zeros(2)}, {}, "SCB"),
        ({}, {"model_type": "mamba"}, "no table of tensor names"),
        ({}, {"auto_map": {"AutoModel": "x.y"}}, "run code"),
    ],
)
def test_a_base_that_cannot_take_an_adapter_is_refused(
    tmp_path: Path, arrays: Arrays, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputRefused, match=match):
        open_base(write_base(tmp_path, {**base_arrays(), **arrays}, config))


def test_a_folder_that_medexport_quantized_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path)
    (tmp_path / "quantization.json").write_text("{}")
    with pytest.raises(InputRefused, match="the base is quantized"):
        open_base(tmp_path)


def test_ties(tmp_path: Path) -> None:
    arrays = base_arrays()
    without = {k: v for k, v in arrays.items() if k != "lm_head.weight"}
    equal = {**arrays, "lm_head.weight": arrays[EMBEDDING]}
    tied, text = {"tie_word_embeddings": True}, {"tie_word_embeddings": None}
    nested = {**text, "text_config": {"tie_word_embeddings": True}}
    assert open_base(write_base(tmp_path / "1", without, tied)).tied
    assert open_base(write_base(tmp_path / "2", equal, tied)).tied
    # As transformers 5: stored and different is not tied, whatever config.json says.
    assert not open_base(write_base(tmp_path / "3", arrays, tied)).tied
    assert not open_base(write_base(tmp_path / "4", arrays)).tied
    assert open_base(write_base(tmp_path / "5", without, text)).tied
    assert open_base(write_base(tmp_path / "6", without, nested)).tied
    with pytest.raises(InputRefused, match="not tied"):
        open_base(write_base(tmp_path / "7", without))
    with pytest.raises(InputRefused, match="no tensor 'model.text_model.embed_tokens"):
        open_base(write_base(tmp_path / "8", {"lm_head.weight": zeros(2, 2)}))


def test_one_tensor_in_two_layouts_is_refused(tmp_path: Path) -> None:
    arrays = {**base_arrays(), "text_model.norm.weight": zeros(8)}
    with pytest.raises(InputRefused, match="the same tensor in two layouts"):
        open_base(write_base(tmp_path, arrays))
