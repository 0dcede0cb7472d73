"""Calibration and a real quantizer together: GPTQ loses less on the captions than rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.calibrate.evaluate import CaptionModel
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.calibrate.walk import walk_decoder
from exporter.core.blocks import BlockFormat, dequantize
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.captioners.idefics3 import tower_spec
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore

Array = NDArray[np.float32]


class Noted:
    """A `BlockQuantizer` whose results are kept for evaluation."""

    def __init__(self, inner: BlockQuantizer) -> None:
        self.inner, self.result = inner, dict[str, Array]()

    def __call__(
        self, layer: int, weights: Mapping[str, Array], inputs: object
    ) -> dict[str, Array]:
        changed = dict(self.inner(layer, weights, inputs))  # type: ignore[arg-type]
        self.result |= changed
        return changed


@pytest.mark.parametrize("scheme_name", ["int4-gptq", "int4-awq-gptq"])
def test_calibrated_methods_beat_rounding(
    merged: Path,
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    tmp_path: Path,
    scheme_name: str,
) -> None:
    tower = tower_spec(read_config(merged / "config.json"))
    scheme = find_scheme(scheme_name)
    plans = plan_layers(checkpoint, spec, tower, scheme)
    store = BlockStore(tmp_path / "blocks", "test")
    visitor = Noted(BlockQuantizer(store, spec, plans))
    walk_decoder(checkpoint, spec, prompts, visitor, threads=1, keep=tmp_path / "states")
    assert all(store.rows(layer) is not None for layer in range(spec.layers))
    fmt = scheme.decoder
    assert isinstance(fmt, BlockFormat)
    rounded = {
        p.name: dequantize(quantize_matrix(checkpoint.float32(p.name), fmt, search=True))
        for p in plans
        if p.kind == "linear" and p.name in visitor.result
    }
    assert len(rounded) == 7 * spec.layers
    model = CaptionModel(checkpoint, spec, prompts, threads=1)
    assert 0 < model.kl(visitor.result) < 0.7 * model.kl(rounded)
