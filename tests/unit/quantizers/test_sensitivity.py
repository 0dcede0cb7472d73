"""The journal of measurements, and the weights that a plan stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from exporter.core.blocks import dequantize
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.idefics3 import decoder_spec, tower_spec
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.schemes import INT8, find_scheme
from exporter.quantizers.sensitivity import LEAST, Journal, measure_units, planned_weights
from exporter.quantizers.sequential import BlockQuantizer, BlockStore
from exporter.quantizers.units import plan_units
from tests.unit.quantizers.conftest import Writer
from tests.unit.quantizers.correlated import inputs, statistics


class Counted:
    """A measurement that notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []

    def __call__(self, bits: Mapping[str, int]) -> float:
        self.asked.append(dict(bits))
        return float(sum(16 - b for b in bits.values()))


def test_a_choice_is_measured_once_and_across_runs(tmp_path: Path) -> None:
    path, measure = tmp_path / "j.json", Counted()
    journal = Journal(path, "key")
    assert journal.kl({"b": 8, "a": 4}, measure) == 20
    assert journal.kl({"a": 4, "b": 8, "c": 16}, measure) == 20
    assert measure.asked == [{"a": 4, "b": 8}]
    assert Journal(path, "key").kl({"a": 4, "b": 8}, measure) == 20
    assert len(measure.asked) == 1
    assert Journal(path, "other").kl({"a": 4, "b": 8}, measure) == 20
    assert len(measure.asked) == 2


def test_float16_costs_nothing_and_rounding_noise_is_not_free(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.json", "key")
    assert journal.kl({"a": 16}, Counted()) == 0.0
    assert journal.kl({"a": 8}, lambda _: -1e-8) == LEAST


def test_options_have_each_units_own_cost(write_model: Writer) -> None:
    folder = write_model()
    config = read_config(folder / "config.json")
    spec = decoder_spec(config)
    plans = plan_units(Checkpoint.open(folder), spec, tower_spec(config), find_scheme("mixed"))
    measure = Counted()
    found = measure_units(plans, measure)
    assert [[o.bits for o in options] for options in found] == [[4, 8, 16]] * len(plans.units)
    assert [o.kl for o in found[0]] == [12, 8, 0]
    assert all(len(bits) == 1 for bits in measure.asked)


def test_weights_come_from_the_store_in_its_format_else_are_rounded(
    write_model: Writer, tmp_path: Path
) -> None:
    folder = write_model()
    config = read_config(folder / "config.json")
    spec, checkpoint = decoder_spec(config), Checkpoint.open(folder)
    plans = plan_units(checkpoint, spec, tower_spec(config), find_scheme("mixed"))
    store = BlockStore(tmp_path / "store", "key")
    at = f"{spec.prefix}layers.0."
    block = {n: checkpoint.float32(n) for n in checkpoint.tensors if n.startswith(at)}
    seen = {n: statistics(inputs(w.shape[1], 300, seed=1)) for n, w in block.items() if w.ndim == 2}
    visitor = BlockQuantizer(store, spec, plans.by_bits[4])
    quantized = visitor(0, block, seen)
    name = at + "mlp.down_proj.weight"
    low = planned_weights(checkpoint, plans.by_bits[4], [store.open(0)])
    assert np.array_equal(low[name], quantized[name])
    eight = planned_weights(checkpoint, plans.by_bits[8], [store.open(0)])
    row = next(p for p in plans.by_bits[8] if p.name == name)
    assert row.format is not None and row.format.bits == INT8.bits
    rounded = quantize_matrix(checkpoint.float32(name), row.format, search=False)
    assert np.array_equal(eight[name], dequantize(rounded))
    assert not np.array_equal(eight[name], low[name])
    # Block 1 is not in the store, and GPTQ without inputs is not made up.
    with pytest.raises(ValueError, match="no stored block"):
        _ = low[name.replace("layers.0", "layers.1")]
    assert "model.text_model.norm.weight" not in low
    with pytest.raises(KeyError):
        _ = low["model.text_model.norm.weight"]
