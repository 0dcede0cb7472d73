"""Key layouts: the table of versions, peft's forms, and properties of the renaming."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.adapters.keys import parse_key
from exporter.core.errors import InputRefused
from exporter.families.checkpoints import layout_of
from exporter.families.layouts.names import Layout
from exporter.families.table import ALL_FAMILIES

LAYOUTS = [layout for family in ALL_FAMILIES.values() for layout in family.LAYOUTS]
ROWS = {kind: layout for layout in LAYOUTS for kind in layout.model_types}
PATHS = st.lists(
    st.sampled_from(
        [
            "model",
            "language_model",
            "text_model",
            "visual",
            "vision_tower",
            "vision_model",
            "layers",
            "0",
            "11",
            "q_proj",
            "lm_head",
            "weight",
            "embed_tokens",
            "norm",
            "transformer",
            "h",
            "connector",
        ]
    ),
    min_size=1,
    max_size=7,
    unique=True,
).map(".".join)

# transformers <= 4.51, 4.52 to 4.57, 5: one row per part.
LLAVA = [
    (
        "language_model.model.layers.3.mlp.up_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "model.language_model.layers.3.mlp.up_proj",
    ),
    ("language_model.lm_head", "lm_head", "lm_head"),
    (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ),
    (
        "multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_1",
    ),
    ("image_newline", "model.image_newline", "model.image_newline"),
]
QWEN = [
    ("model.layers.1.mlp.up_proj", *["model.language_model.layers.1.mlp.up_proj"] * 2),
    ("model.embed_tokens", *["model.language_model.embed_tokens"] * 2),
    ("visual.blocks.0.attn.qkv", *["model.visual.blocks.0.attn.qkv"] * 2),
    ("lm_head", "lm_head", "lm_head"),
]
IDEFICS = [
    tuple(["model.text_model.layers.0.self_attn.q_proj"] * 3),
    tuple(["model.vision_model.encoder.layers.0.mlp.fc1"] * 3),
    tuple(["model.connector.modality_projection.proj"] * 3),
    ("text_model.layers.0.mlp.up_proj", *["model.text_model.layers.0.mlp.up_proj"] * 2),
]
CASES = [
    *[("llava", row) for row in LLAVA],
    *[("llava_next", row) for row in LLAVA],
    *[("qwen2_vl", row) for row in QWEN],
    *[("qwen2_5_vl", row) for row in QWEN],
    *[("smolvlm", row) for row in IDEFICS],
    *[("idefics3", row) for row in IDEFICS],
]


@pytest.mark.parametrize(("kind", "names"), CASES)
def test_all_versions_mean_the_newest_name(kind: str, names: tuple[str, ...]) -> None:
    assert {layout_of({"model_type": kind}).canonical(name) for name in names} == {names[-1]}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.model_types[0])
@settings(max_examples=60, deadline=None)
@given(name=PATHS)
def test_a_newest_name_stays(layout: Layout, name: str) -> None:
    once = layout.canonical(name)
    assert layout.canonical(once) == once
    assert layout.canonical(layout.embedding) == layout.embedding
    assert layout.canonical(layout.head) == layout.head


M = "model.text_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize(
    ("key", "module", "part", "adapter"),
    [
        (f"{M}.lora_A.weight", M, "lora_A", None),
        (f"{M}.lora_B.default.weight", M, "lora_B", "default"),
        (f"{M}.lora_B.bias", M, "lora_B_bias", None),
        (f"{M}.lora_B.mine.bias", M, "lora_B_bias", "mine"),
        (f"{M}.lora_embedding_A", M, "lora_embedding_A", None),
        (f"{M}.lora_embedding_B.default", M, "lora_embedding_B", "default"),
        (f"{M}.lora_magnitude_vector", M, "lora_magnitude_vector", None),
        (f"{M}.lora_magnitude_vector.weight", M, "lora_magnitude_vector", None),
        (f"{M}.lora_magnitude_vector.mine", M, "lora_magnitude_vector", "mine"),
        (f"{M}.lora_magnitude_vector.mine.weight", M, "lora_magnitude_vector", "mine"),
        (f"{M}.base_layer.weight", f"{M}.weight", "base", None),
        (f"{M}.base_layer.bias", f"{M}.bias", "whole", None),
        ("lm_head.weight", "lm_head.weight", "whole", None),
        ("lm_head.modules_to_save.weight", "lm_head.weight", "whole", None),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight", "whole", "default"),
        ("model.connector.x.bias", "model.connector.x.bias", "whole", None),
    ],
)
def test_forms_of_keys(prefix: str, key: str, module: str, part: str, adapter: str | None) -> None:
    found = parse_key(prefix + key, ROWS["smolvlm"])
    assert (found.module, found.part, found.adapter) == (module, part, adapter)
    assert found.key == prefix + key


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputRefused, match="has no table of tensor names; known: .*gpt2"):
        layout_of({"model_type": "mamba"})
    with pytest.raises(InputRefused, match="None"):
        layout_of({})
