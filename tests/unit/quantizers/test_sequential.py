"""Block after block: resume, assembly, and the assembled folder in onnxruntime against torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.idefics3 import decoder_spec, tower_spec
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES, Scheme, find_scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble
from tests.support.syncs import Syncs
from tests.support.tiny import write_tiny_model
from tests.unit.quantizers.correlated import inputs, statistics

Array = NDArray[np.float32]
CALIBRATED = [s.name for s in SCHEMES.values() if s.calibrated and s.method != "smoothquant"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=3, seed=3)


class Bench:
    """One model, one scheme, and inputs that depend on the layer and the matrix only."""

    def __init__(self, source: Path, scheme: Scheme) -> None:
        config = read_config(source / "config.json")
        self.source, self.scheme = source, scheme
        self.checkpoint, self.spec = Checkpoint.open(source), decoder_spec(config)
        self.plans = plan_layers(self.checkpoint, self.spec, tower_spec(config), scheme)

    def block(self, layer: int) -> dict[str, Array]:
        at = f"{self.spec.prefix}layers.{layer}."
        names = [n for n in self.checkpoint.tensors if n.startswith(at)]
        return {n: self.checkpoint.float32(n) for n in names}

    def inputs(self, layer: int, weights: Mapping[str, Array]) -> dict[str, InputStatistics]:
        groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down",))
        found = {}
        for number, group in enumerate(groups):
            names = [n for n, w in weights.items() if w.ndim == 2 and any(g in n for g in group)]
            x = inputs(weights[names[0]].shape[1], 200, seed=10 * layer + number)
            found |= dict.fromkeys(names, statistics(x))
        return found

    def visit(self, store: BlockStore, layer: int) -> Mapping[str, Array]:
        weights = self.block(layer)
        quantizer = BlockQuantizer(store, self.spec, self.plans)
        return quantizer(layer, weights, self.inputs(layer, weights))

    def finish(self, store: BlockStore, out: Path) -> Path:
        out.mkdir()
        assemble(self.source, out, self.scheme, self.spec, store, threads=2)
        return out


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_assembled_folder_runs_and_equals_torch(
    name: str, source: Path, tmp_path: Path
) -> None:
    import onnxruntime as ort
    import torch
    from transformers import Idefics3ForConditionalGeneration

    from exporter.graphs.export import export_model

    bench, store = Bench(source, find_scheme(name)), BlockStore(tmp_path / "work", "k")
    returned: dict[str, Array] = {}
    for layer in range(3):
        returned |= bench.visit(store, layer)
    out = bench.finish(store, tmp_path / "q")
    (tmp_path / "e").mkdir()
    export_model(out, tmp_path / "e", accuracy_level=0)

    from exporter.runtimes.torch_reference import TorchCaptioner

    model = TorchCaptioner(out, threads=1).model
    assert isinstance(model, Idefics3ForConditionalGeneration)
    state = {n.removeprefix("model."): t for n, t in model.state_dict().items()}
    for tensor, values in returned.items():  # what the walk went on with is what was assembled
        assert np.array_equal(state[tensor.removeprefix("model.")].numpy(), values)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (1, 12)))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    graphs = tmp_path / "e" / "model" / "onnx"
    rows = ort.InferenceSession(graphs / "embed_tokens.onnx", options).run(
        None, {"input_ids": ids.numpy()}
    )[0]
    decoder = ort.InferenceSession(graphs / "decoder_model_merged.onnx", options)
    feeds = {
        "inputs_embeds": rows,
        "attention_mask": np.ones((1, 12), np.int64),
        "num_logits_to_keep": np.array(0, np.int64),
    }
    empty = np.zeros((1, bench.spec.kv_heads, 0, bench.spec.head_dim), np.float32)
    feeds |= {i.name: empty for i in decoder.get_inputs() if i.name.startswith("past")}
    got = decoder.run(["logits"], feeds)[0][0]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["int4-gptq", "int4-awq-gptq"])
def test_a_resumed_run_leaves_the_same_bytes(name: str, source: Path, tmp_path: Path) -> None:
    bench = Bench(source, find_scheme(name))
    whole, broken = BlockStore(tmp_path / "a", "k"), BlockStore(tmp_path / "b", "k")
    for layer in range(3):
        bench.visit(whole, layer)
    for layer in (0, 1):
        bench.visit(broken, layer)
    (broken.folder / "layer-00001.json").unlink()  # killed between the two files
    times = (broken.folder / "layer-00000.safetensors").stat().st_mtime_ns
    again = [bench.visit(broken, layer) for layer in range(3)]

    assert digests(whole.folder) == digests(broken.folder)
    assert (broken.folder / "layer-00000.safetensors").stat().st_mtime_ns == times
    for layer in range(3):
        for tensor, values in bench.visit(whole, layer).items():
            assert np.array_equal(again[layer][tensor], values)
    first = bench.finish(whole, tmp_path / "qa")
    assert digests(first) == digests(bench.finish(broken, tmp_path / "qb"))


def test_a_block_is_on_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, store, syncs = (
        Bench(source, find_scheme("int4-gptq")),
        BlockStore(tmp_path / "w", "k"),
        Syncs(monkeypatch),
    )
    bench.visit(store, 0)
    names = [path.name for path, _ in syncs.renames]
    assert names == ["layer-00000.safetensors", "layer-00000.json"]
    assert all(path in synced for path, synced in syncs.renames)


def test_blocks_of_another_run_and_damaged_blocks_are_made_anew(
    source: Path, tmp_path: Path
) -> None:
    bench = Bench(source, find_scheme("int4-gptq"))
    store = BlockStore(tmp_path / "w", "one")
    bench.visit(store, 0)
    before = digests(store.folder)
    assert store.rows(0) is not None
    assert BlockStore(tmp_path / "w", "other").rows(0) is None

    path = store.folder / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")

    assert store.rows(0) is None
    bench.visit(store, 0)
    assert digests(store.folder) == before


def test_a_missing_block_is_said_by_number(source: Path, tmp_path: Path) -> None:
    bench, store = Bench(source, find_scheme("int4-gptq")), BlockStore(tmp_path / "w", "k")
    for layer in (0, 2):
        bench.visit(store, layer)
    with pytest.raises(InputRefused, match="block 1 of 3 is missing"):
        bench.finish(store, tmp_path / "q")


def test_weights_that_were_not_planned_and_missing_inputs_are_refused(
    source: Path, tmp_path: Path
) -> None:
    bench, store = Bench(source, find_scheme("int4-gptq")), BlockStore(tmp_path / "w", "k")
    weights = bench.block(0)
    stats, quantizer = bench.inputs(0, weights), BlockQuantizer(store, bench.spec, bench.plans)
    down = next(n for n in weights if "down_proj" in n)
    with pytest.raises(InputRefused, match="not those of the plan"):
        quantizer(0, {n: w for n, w in weights.items() if n != down}, stats)
    with pytest.raises(InputRefused, match=r"no inputs were seen for .*down_proj"):
        quantizer(0, weights, {n: s for n, s in stats.items() if n != down})
    assert not store.folder.exists()


def test_every_layer_is_reported(source: Path, tmp_path: Path) -> None:
    bench, store = Bench(source, find_scheme("int4-awq-gptq")), BlockStore(tmp_path / "w", "k")
    for layer in range(3):
        bench.visit(store, layer)

    rows = json.loads((bench.finish(store, tmp_path / "q") / "quantization.json").read_text())

    blocks = [r for r in rows["layers"] if ".text_model.layers." in r["name"]]
    assert len(blocks) == 3 * 7
    for row in blocks:
        assert row["method"] == "awq+gptq"
        assert 0 < row["output_error"] < 0.2
        assert row["damping"] > 0
        assert row["damping_raised"] == 0
        assert row["outliers"]["of"] == "inputs"
    assert any(r["outliers"]["channels"] for r in blocks)
    others = [r for r in rows["layers"] if r not in blocks]
    assert {r["method"] for r in others} == {"rtn"}
    assert all(r["outliers"]["of"] == "weights" and r["zero_blocks"] == 0 for r in others)


def test_calibrated_schemes_need_the_walk(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="int4-gptq needs calibration"):
        quantize_model(source, tmp_path, find_scheme("int4-gptq"), threads=1)
