from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.catalog.profiles import model_profiles
from exporter.catalog.shapes import known_config, tensor_table
from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.tensors import Checkpoint, TensorInfo
from exporter.families.captioners import idefics3
from exporter.quantizers.plan import LayerPlan, fit_block, fit_bnb, plan_layers
from exporter.quantizers.schemes import BNB, SCHEMES, Scheme, find_scheme
from tests.unit.quantizers.conftest import CONFIG, Writer, shapes

Tensors = dict[str, NDArray[Any]]
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"


def plan_of(folder: Path, scheme: Scheme) -> dict[str, LayerPlan]:
    config = json.loads((folder / "config.json").read_text())
    found = plan_layers(
        Checkpoint.open(folder), idefics3.decoder_spec(config), idefics3.tower_spec(config), scheme
    )
    assert len({p.name for p in found}) == len(found)
    return {p.name: p for p in found}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_every_tensor_is_planned_and_every_float_has_a_reason(
    write_model: Writer, scheme: Scheme
) -> None:
    plan = plan_of(write_model(), scheme)

    assert {n: p.shape for n, p in plan.items()} == shapes()
    for layer in plan.values():
        assert (layer.format is None) == (layer.kind == "float") == bool(layer.reason)
        assert (layer.entries().keys() == {layer.name}) == (layer.format is None)
    tables = {HEAD: scheme.head, EMBEDDING: scheme.embedding}
    for name, layer in plan.items():
        if len(layer.shape) == 2 and "position" not in name:
            wanted = tables.get(name, scheme.decoder)
            if wanted and scheme.method in BNB:
                wanted = fit_bnb(*layer.shape, wanted)
            assert bool(layer.format) == bool(wanted)


def test_bitsandbytes_takes_linear_layers_in_whole_blocks(write_model: Writer) -> None:
    for name, bits, method in (("bnb-nf4", 4, "bnb-nf4"), ("bnb-int8", 8, "bnb-int8")):
        plan = plan_of(write_model(), find_scheme(name))
        assert plan[HEAD].format is plan[EMBEDDING].format is None
        for layer in plan.values():
            if layer.format:
                rows, columns = layer.shape
                per_row = 4 * rows * columns // 64 if bits == 4 else 2 * rows * len_blocks(layer)
                assert layer.bytes == rows * columns * bits // 8 + per_row
                assert layer.method == method
    nf4, int8 = find_scheme("bnb-nf4").decoder, find_scheme("bnb-int8").decoder
    assert nf4 and int8
    assert fit_bnb(3, 32, nf4) is None  # 96 values
    assert fit_bnb(4, 32, nf4) == nf4
    assert fit_bnb(7, 960, int8) == BlockFormat(8, 64, True)
    assert fit_bnb(7, 1024, int8) == BlockFormat(8, 256, True)
    assert fit_bnb(7, 24, int8) is None


def len_blocks(layer: LayerPlan) -> int:
    assert layer.format
    return layer.columns // layer.format.block


def test_int4_rtn_uses_four_bits_in_the_decoder_and_eight_elsewhere(write_model: Writer) -> None:
    plan = plan_of(write_model(), find_scheme("int4-rtn"))

    bits = Counter((p.kind, p.format.bits, p.method) for p in plan.values() if p.format)
    assert bits == {
        ("linear", 4, "rtn-mse"): 14,
        ("linear", 8, "rtn"): 7,
        ("head", 8, "rtn"): 1,
        ("embedding", 8, "rtn"): 1,
    }


def test_a_plan_of_bytes_is_what_its_entries_hold(write_model: Writer) -> None:
    sizes = {"U8": 1, "F16": 2}
    for layer in plan_of(write_model(), find_scheme("int4-rtn-small")).values():
        held = sum(sizes[d] * int(np.prod(s)) for d, s in layer.entries().values())
        assert layer.bytes == held


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop(HEAD), r"1 tensors are missing: 'lm_head\.weight'"),
    (lambda t: t.pop("model.text_model.layers.1.mlp.up_proj.weight"), r"missing.*mlp\.up_proj"),
    (lambda t: t.update({"model.extra.weight": np.ones(3, "f2")}), r"unknown.*model\.extra"),
    (lambda t: t.update({"a\nb": np.ones(3, "f2")}), r"unknown.*'a\\nb'"),
    (lambda t: t.update({"model.text_model.layers.0.self_attn.q_proj.weight.scales":
                         np.ones(3, "f2")}), r"unknown.*scales"),
    (lambda t: t.update({HEAD: np.ones((130, 95), "f2")}), r"lm_head.*\[130, 95\].*\[130, 96\]"),
    (lambda t: t.update({HEAD: np.ones((130, 96), "i8")}), r"lm_head.*I64.*floating"),
])  # fmt: skip
def test_a_tensor_out_of_place_is_refused_by_name(
    write_model: Writer, change: Any, said: str
) -> None:
    folder = write_model(change)

    with pytest.raises(InputRefused, match=said) as caught:
        plan_of(folder, find_scheme("int8"))
    assert "\n" not in str(caught.value)


def test_buffers_of_older_transformers_are_left_out(write_model: Writer) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.vision_model.embeddings.position_ids"] = np.arange(16)[None]

    assert plan_of(write_model(add), find_scheme("int8")).keys() == shapes().keys()


def test_a_head_with_the_embeddings_bytes_is_planned_once(write_model: Writer) -> None:
    def share(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].copy()

    plan = plan_of(write_model(share), find_scheme("int4-rtn"))
    assert plan.keys() == shapes().keys() - {HEAD}
    assert plan[EMBEDDING].kind == "embedding"


def test_one_differing_value_keeps_the_head_apart(write_model: Writer) -> None:
    def nearly(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][129, 95] += 1

    assert HEAD in plan_of(write_model(nearly), find_scheme("int4-rtn"))
    with pytest.raises(InputRefused, match="tie_word_embeddings"):
        plan_of(write_model(nearly, tie_word_embeddings=True), find_scheme("int4-rtn"))


def test_a_tied_model_without_a_head(write_model: Writer) -> None:
    plan = plan_of(
        write_model(lambda t: t.pop(HEAD), tie_word_embeddings=True), find_scheme("int8")
    )
    assert plan.keys() == shapes().keys() - {HEAD}


@pytest.mark.parametrize(
    ("columns", "block", "whole", "expected"),
    [
        (960, 128, True, 64),
        (960, 128, False, 64),
        (960, 32, False, 32),
        (1024, 128, False, 128),
        (2560, 128, True, 128),
        (96, 128, False, 32),
        (72, 64, False, 16),
        (1000, 128, False, 128),
        (1000, 128, True, None),
        (48, 128, True, 16),
    ],
)
def test_fit_block(columns: int, block: int, whole: bool, expected: int | None) -> None:
    fmt = fit_block(columns, BlockFormat(8, block, symmetric=True), whole=whole)

    assert (fmt.block if fmt else None) == expected


class PublishedCheckpoint(Checkpoint):
    """The published names and shapes of a profile, without data."""

    def __init__(self, table: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {
            n: TensorInfo(n, "BF16", s, Path(n), 0, 2 * int(np.prod(s))) for n, s in table.items()
        }

    def same_bytes(self, one: str, other: str) -> bool:
        return False


def test_an_embedding_that_no_block_divides_stays_float_and_says_so() -> None:
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"hidden_size": 90}}
    decoder, tower = idefics3.decoder_spec(config), idefics3.tower_spec(config)

    plan = plan_layers(PublishedCheckpoint(shapes(90)), decoder, tower, find_scheme("int8"))

    found = {p.name: p for p in plan}
    assert found[EMBEDDING].kind == "float"
    assert "90 columns are no multiple of 16" in found[EMBEDDING].reason
    assert found[HEAD].format is not None


PUBLISHED = [
    name
    for name, profile in model_profiles().items()
    if profile.family == "idefics3" and profile.facts.tensor_shapes
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_planned_in_full(name: str) -> None:
    profile = model_profiles()[name]
    table = tensor_table(profile)
    config: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    for key, value in known_config(profile).items():
        part, _, rest = key.rpartition(".")
        (config[part] if part else config)[rest] = value
    decoder, tower = idefics3.decoder_spec(config), idefics3.tower_spec(config)

    plan = plan_layers(PublishedCheckpoint(table), decoder, tower, find_scheme("int4-rtn"))

    assert {p.name for p in plan} == table.keys()
    assert sum(p.format is not None for p in plan) == 7 * decoder.layers + 6 * tower.layers + 3 - (
        decoder.tied
    )


def test_an_unknown_scheme_suggests_the_nearest() -> None:
    with pytest.raises(WrongUsage, match="did you mean int4-rtn"):
        find_scheme("int4_rtn")
    with pytest.raises(WrongUsage, match="known: fp16, int8"):
        find_scheme("zzz")
