"""Units of a mixed scheme: every matrix once, sizes as they are written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.core.modelfiles import read_config, read_json
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.idefics3 import decoder_spec, tower_spec
from exporter.quantizers.allocate import Option, assign
from exporter.quantizers.run import write_planned
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.units import UnitPlans, plan_units
from tests.unit.quantizers.conftest import Writer

BLOCK = "model.text_model.layers."


def plans_of(folder: Path) -> tuple[Checkpoint, UnitPlans]:
    config = read_config(folder / "config.json")
    checkpoint = Checkpoint.open(folder)
    found = plan_units(checkpoint, decoder_spec(config), tower_spec(config), find_scheme("mixed"))
    return checkpoint, found


def written_bytes(path: Path) -> int:
    """Bytes of all tensors in a safetensors file, without its header."""
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_every_matrix_is_in_one_unit(write_model: Writer) -> None:
    checkpoint, plans = plans_of(write_model())
    counts = Counter(name for unit in plans.units for name in unit.tensors)
    matrices = [n for n, t in checkpoint.tensors.items() if len(t.shape) == 2]
    assert set(counts.values()) == {1}
    assert set(counts) == set(matrices) - {
        "model.vision_model.embeddings.position_embedding.weight"
    }
    by_name = {unit.name: unit for unit in plans.units}
    assert by_name[f"{BLOCK}0.self_attn.qkv"].tensors == tuple(
        f"{BLOCK}0.self_attn.{n}_proj.weight" for n in "qkv"
    )
    assert len(by_name[f"{BLOCK}1.mlp.gate_up"].tensors) == 2
    assert by_name["model.vision_model.encoder.layers.0"].vision
    assert len(by_name["model.vision_model.encoder.layers.0"].tensors) == 6
    assert {"lm_head", "model.text_model.embed_tokens"} <= by_name.keys()
    assert plans.choices == (4, 8, 16)


def test_a_shared_matrix_is_one_unit(write_model: Writer) -> None:
    def share(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"].copy()

    _, plans = plans_of(write_model(share))
    names = [unit.name for unit in plans.units]
    assert "lm_head" not in names and "model.text_model.embed_tokens" in names


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_those_of_the_written_file(
    write_model: Writer, tmp_path: Path, seed: int
) -> None:
    checkpoint, plans = plans_of(write_model())
    rng = np.random.default_rng(seed)
    bits = {unit.name: int(rng.choice(plans.choices)) for unit in plans.units}
    options = [
        [Option(b, plans.unit_bytes(unit, b), 0.0) for b in plans.choices] for unit in plans.units
    ]
    picks = [plans.choices.index(bits[unit.name]) for unit in plans.units]
    predicted = assign(options, picks).bytes + plans.fixed_bytes
    chosen = tuple(
        # Plain rounding stands in for GPTQ, whose bytes are the same.
        p if p.method != "gptq" else type(p)(*[*vars(p).values()][:4], "rtn", p.reason, p.bytes)
        for p in plans.chosen(bits)
    )
    out = tmp_path / "out"
    out.mkdir()
    write_planned(checkpoint, chosen, out, "mixed", threads=1)
    assert written_bytes(out / "model.safetensors") == predicted
    rows = {row["name"]: row["bits"] for row in read_json(out / "quantization.json")["layers"]}
    for unit in plans.units:
        assert {rows.get(name, 16) for name in unit.tensors} == {bits[unit.name]}


def test_the_uniform_plan_is_one_of_the_choices(write_model: Writer) -> None:
    _, plans = plans_of(write_model())
    bits = plans.bits_of(plans.uniform)
    assert plans.chosen(bits) == plans.uniform
    assert bits[f"{BLOCK}0.mlp.down_proj"] == 4 and bits["lm_head"] == 8


def test_a_scheme_without_choices_has_no_units(write_model: Writer) -> None:
    folder = write_model()
    config = read_config(folder / "config.json")
    with pytest.raises(ValueError, match="int8 has no formats"):
        plan_units(
            Checkpoint.open(folder), decoder_spec(config), tower_spec(config), find_scheme("int8")
        )
