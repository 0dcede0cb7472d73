"""Names of schemes, and what may stand behind them."""

from __future__ import annotations

import pytest

from exporter.core.blocks import BlockFormat
from exporter.core.errors import WrongUsage
from exporter.quantizers.schemes import (
    INT8,
    SCHEMES,
    base_name,
    find_scheme,
    refuse_for_dialect,
    variant_name,
)


@pytest.mark.parametrize(
    ("name", "block", "symmetric"),
    [
        ("int4-gptq-g32", 32, False),
        ("int4-gptq-g128", 128, False),
        ("int4-gptq-sym", 64, True),
        ("int4-gptq-g32-sym", 32, True),
    ],
)
def test_a_name_says_the_form_of_the_4_bit_blocks(name: str, block: int, symmetric: bool) -> None:
    scheme = find_scheme(name)
    assert scheme.name == name
    assert scheme.decoder == BlockFormat(4, block, symmetric)
    assert (scheme.head, scheme.embedding, scheme.vision) == (INT8, INT8, INT8)
    assert scheme.method == "gptq"
    assert find_scheme(scheme.name) == scheme


def test_all_4_bit_parts_and_choices_take_the_form() -> None:
    small, mixed = find_scheme("int4-rtn-small-g32-sym"), find_scheme("mixed-g128")
    assert {small.decoder, small.head, small.embedding} == {BlockFormat(4, 32, True)}
    assert mixed.choices == (BlockFormat(4, 128, False), INT8)
    assert mixed.decoder == BlockFormat(4, 128, False)


@pytest.mark.parametrize("name", ["int4-gptq-g64", "int4-gptq-asym", "int4-gptq-g64-asym"])
def test_the_rows_own_form_leaves_no_trace(name: str) -> None:
    assert find_scheme(name) is SCHEMES["int4-gptq"]


def test_options_are_put_behind_a_name_and_replace_what_stands_there() -> None:
    assert variant_name("int4", None, None) == "int4"
    assert variant_name("int4", 32, True) == "int4-g32-sym"
    assert variant_name("int4-gptq-g32", None, True) == "int4-gptq-g32-sym"
    assert variant_name("int4-gptq-g32-sym", 128, False) == "int4-gptq-g128-asym"
    assert (
        find_scheme("int4-gptq-g32-g128").name == "int4-gptq-g128"
    )  # a profile's, then the option's
    assert base_name("int4-rtn-small-g32-sym") == "int4-rtn-small"


@pytest.mark.parametrize("name", ["int8-g32", "fp16-sym", "int8-g32-asym", "bnb-nf4-g32"])
def test_a_form_without_4_bit_blocks_is_refused(name: str) -> None:
    with pytest.raises(WrongUsage, match="has no 4-bit blocks") as caught:
        find_scheme(name)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_block_sizes_are_refused() -> None:
    with pytest.raises(WrongUsage, match=r"did you mean int4-gptq"):
        find_scheme("int4-gptx-g32")
    with pytest.raises(WrongUsage, match="blocks of 48 values; expected 32, 64 or 128"):
        find_scheme("int4-gptq-g48")


def test_the_standard_dialect_takes_symmetric_blocks_only() -> None:
    for name in ("fp16", "int8", "int4-gptq-sym"):
        refuse_for_dialect(find_scheme(name), "standard")
    for name in SCHEMES:
        refuse_for_dialect(find_scheme(name), "ort")
    with pytest.raises(
        WrongUsage, match=r"int4-gptq stores asymmetric blocks \(decoder\); .*--sym"
    ):
        refuse_for_dialect(find_scheme("int4-gptq"), "standard")
    with pytest.raises(WrongUsage, match=r"\(decoder, head, embedding\)"):
        refuse_for_dialect(find_scheme("int4-rtn-small"), "standard")
    with pytest.raises(WrongUsage, match="stores NF4, which only onnxruntime"):
        refuse_for_dialect(find_scheme("bnb-nf4"), "standard")
    with pytest.raises(WrongUsage, match="int8-static codes inputs around a zero point"):
        refuse_for_dialect(find_scheme("int8-static"), "standard")
    with pytest.raises(WrongUsage, match="no dialect 'trt'; expected ort or standard"):
        refuse_for_dialect(find_scheme("int8"), "trt")
