"""Patterns of adapter_config.json: peft's reading, and bounded cost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.adapters.patterns import check_pattern, inside, layer_index, look_up, named
from exporter.core.errors import InputRefused

MODULES = st.sampled_from(
    [
        "model.text_model.layers.1.self_attn.q_proj",
        "model.text_model.layers.11.self_attn.q_proj",
        "model.vision_model.encoder.layers.0.mlp.fc1",
        "model.connector.proj",
        "lm_head",
    ]
)
PATTERNS = st.sampled_from(
    [
        "q_proj",
        "proj",
        "layers.1.self_attn.q_proj",
        r".*layers\.\d+\..*",
        "^lm_head",
        "fc1|proj",
        "x",
    ]
)


@settings(max_examples=150, deadline=None)
@given(module=MODULES, patterns=st.lists(PATTERNS, unique=True, max_size=4))
def test_look_up_reads_patterns_as_peft(module: str, patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    values = {pattern: number + 1 for number, pattern in enumerate(patterns)}
    key = get_pattern_key(list(values), module)
    assert look_up(values, module, 0) == values.get(key, 0)


@settings(max_examples=150, deadline=None)
@given(
    module=MODULES,
    names=st.lists(st.sampled_from(["q_proj", "proj", "fc1", "lm_head", "mlp.fc1"]), min_size=1),
    layers=st.none() | st.lists(st.integers(0, 12), min_size=1),
    pattern=st.none() | st.just("layers"),
)
def test_targets_and_layers_are_chosen_as_peft_does(
    module: str, names: list[str], layers: list[int] | None, pattern: str | None
) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        target_modules=names,
        layers_to_transform=layers,
        layers_pattern=pattern if layers is not None else None,
    )
    ours = named(module, names)
    # Peft looks at the layers only for targets that are not spelled out in full.
    if layers is not None and module not in names:
        ours = ours and layer_index(module, [pattern] if pattern else []) in layers
    assert ours == bool(check_target_module_exists(config, module))


def test_inside_means_whole_path_elements() -> None:
    assert inside("model.connector.proj", ["connector"])
    assert inside("lm_head", ["lm_head"])
    assert not inside("model.connector2.proj", ["connector"])
    assert not inside("model.lm_head_2", ["lm_head"])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a|a)*b",
        "((x))+",
        r"(.)\1",
        "(?P<n>a)(?P=n)",
        "(a){2,}",
        ".*" * 4,
        "a?" * 30,
        "a{0,1}" * 30,
        "(a|a)" * 30,
        "(?:a|a)" * 30,
        "((a)|a)" * 30,
        "([(]|a)" * 30,
        "a?" * 3 + "(a|b)" * 2,
        "a|" * 33,
        "a" * 501,
    ],
)
def test_costly_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(InputRefused, match="'rank_pattern'"):
        check_pattern(pattern, "rank_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*text_model.*\.(q|v)_proj",
        r".*layers\.\d+\.(?:self_attn|mlp)\.x",
        r"layers\.[0-9]+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        r"model\.layers\.0\.x\?\+\*",
        "a{2}",
    ],
)
def test_ordinary_patterns_pass(pattern: str) -> None:
    assert check_pattern(pattern, "rank_pattern") == pattern


def test_the_worst_pattern_that_passes_ends() -> None:
    worst = check_pattern(".*a" * 3 + "a?" * 4, "rank_pattern")
    start = time.perf_counter()
    assert look_up({worst: 1}, "a" * 80 + "b", 0) == 0
    assert time.perf_counter() - start < 20
