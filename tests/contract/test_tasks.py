"""What every family that does not caption promises, on a tiny random model in its published layout.

The reference is torch: transformers' own methods with the merged float16 weights in float32, and for
models that transformers has no class for a plain one of the published code. A family is a row of
`tests.support.task_cases`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.base import BUFFERS, Feed
from exporter.families.table import required_task_family
from exporter.families.tasks import TaskFamily
from exporter.graphs.check import check_graphs
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.graphs import OrtGraphs, TorchGraphs
from tests.support.task_adapters import write_task_adapter
from tests.support.task_cases import CASES, TaskCase
from tests.support.task_inputs import INPUTS

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
SCHEMES = ("int8", "int4-rtn")


@dataclass
class Built:
    """One model on disk: published, merged, exported in float32 and per scheme; and torch's own."""

    case: TaskCase
    root: Path
    base: Path
    merged: Path
    family: TaskFamily
    torch: TorchGraphs
    graphs: dict[str, OrtGraphs] = field(default_factory=dict)

    def exported(self, scheme: str) -> OrtGraphs:
        """The graphs of a scheme; "float32" is not quantized."""
        if scheme not in self.graphs:
            source, out = self.merged, self.root / scheme
            out.mkdir()
            if scheme != "float32":
                source = self.root / f"{scheme}-quantized"
                source.mkdir()
                quantize_model(self.merged, source, find_scheme(scheme), threads=1)
            export_model(source, out, float_storage="float32", accuracy_level=0)
            self.graphs[scheme] = OrtGraphs(out / "model", threads=1)
        return self.graphs[scheme]

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        """Inputs of every graph; what comes from another graph is torch's."""
        return INPUTS[self.case.inputs](self.torch)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case: TaskCase = request.param
    root = tmp_path_factory.mktemp(case.name)
    base, merged = case.write(root / "base"), root / "merged"
    merged.mkdir()
    merge_adapters(base, [], merged)
    family = required_task_family(read_config(merged / "config.json"))
    return Built(case, root, base, merged, family, TorchGraphs(merged, threads=1))


def largest(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def by_norm(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Norm of the difference over the norm."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_graphs_load_and_run(built: Built) -> None:
    built.exported("float32")
    checks = check_graphs(built.root / "float32" / "model")
    assert [c.name for c in checks] == list(
        built.family.graphs(read_config(built.merged / "config.json"))
    )


def test_graphs_equal_torch(built: Built) -> None:
    """Every graph on inputs of two shapes or more, none of which it was traced or built with."""
    shapes: dict[str, set[Any]] = {}
    for graph, feed in built.feeds():
        shapes.setdefault(graph, set()).add(tuple(sorted((n, a.shape) for n, a in feed.items())))
        found, expected = built.exported("float32").run(graph, feed), built.torch.run(graph, feed)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert largest(found[name], values) < TOLERANCE, (graph, name)
    names = built.family.graphs(read_config(built.merged / "config.json")).keys()
    assert shapes.keys() == names
    assert min(map(len, shapes.values())) >= 2


def test_torch_equals_the_published_code(built: Built) -> None:
    """Where the published model is none of transformers', against a plain one of its own code."""
    if built.case.reference is None:
        pytest.skip("torch_outputs are those of transformers' own class")
    outputs = built.case.reference(built.base)
    for graph, feed in built.feeds():
        expected, found = outputs(graph, feed), built.torch.run(graph, feed)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert largest(found[name], values) < TOLERANCE, (graph, name)


def test_padding_does_not_change_a_row(built: Built) -> None:
    if built.case.padded is None:
        pytest.skip("texts of this task are never padded")
    graphs = built.exported("float32")
    for graph, alone, padded in built.case.padded(built.torch):
        assert any(padded[n].shape[1:] != a.shape[1:] for n, a in alone.items())
        one, several = graphs.run(graph, alone), graphs.run(graph, padded)
        for name, values in one.items():
            row = several[name][tuple(slice(n) for n in values.shape)]
            assert largest(row, values) < TOLERANCE, (graph, name)


def test_the_preparer_does_what_the_library_does(built: Built) -> None:
    pairs = list(built.case.prepared(built.merged, built.exported("float32").preparer))
    assert len(pairs) >= 3
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape
            assert np.abs(ours[name] - expected).max() <= built.case.slack, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_graphs_stay_near(built: Built, scheme: str) -> None:
    """They compute what torch computes with the stored weights, and stay near the float model."""
    graphs = built.exported(scheme)
    stored = TorchGraphs(built.root / f"{scheme}-quantized", threads=1)
    errors: dict[str, list[float]] = {}
    for graph, feed in built.feeds():
        found, expected = graphs.run(graph, feed), built.torch.run(graph, feed)
        same = stored.run(graph, feed)
        for name, values in expected.items():
            assert largest(found[name], same[name]) < TOLERANCE, (graph, name)
            errors.setdefault(name, []).append(by_norm(found[name], values))
    worst = {name: max(found) for name, found in errors.items()}
    assert 0 < max(worst.values()) < built.case.error[scheme], worst


def test_every_tensor_is_listed_once(built: Built) -> None:
    config = read_config(built.merged / "config.json")
    listed: dict[str, tuple[int, ...]] = {}
    for spec in built.family.graphs(config).values():
        names = [tensor.name for tensor in spec.tensors()]
        assert len(names) == len(set(names))
        listed |= {tensor.name: tensor.shape for tensor in spec.tensors()}
    stored = {
        name: info.shape
        for name, info in Checkpoint.open(built.merged).tensors.items()
        if not BUFFERS.search(name)
    }
    assert listed == stored


def test_an_adapter_merges_and_is_proven(built: Built, tmp_path: Path) -> None:
    case, out = built.case, tmp_path / "out"
    if not case.targets:
        pytest.skip("no adapter is known for this family")
    adapter = write_task_adapter(built.merged, tmp_path / "adapter", case.targets)
    out.mkdir()
    proof = merge_adapters(built.base, [adapter], out)
    assert {t.scaling for t in proof.targets} == {2.0}
    found = prove_logits(built.base, [adapter], out)
    assert found.method == "outputs"
    assert found.base_difference is not None
    assert found.tolerance is not None
    assert found.base_difference > 10 * found.tolerance


WITHOUT_TORCH = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "peft", "torchvision"}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import numpy as np
from exporter.runtimes.graphs import OrtGraphs
from tests.support.task_inputs import INPUTS
graphs = OrtGraphs(Path(sys.argv[1]), threads=1)
found = {}
for place, (graph, feed) in enumerate(INPUTS[sys.argv[2]](graphs)):
    for name, values in graphs.run(graph, feed).items():
        found[f"{place}.{graph}.{name}"] = values
np.savez(sys.argv[3], **found)
"""


def test_it_runs_without_torch(built: Built, tmp_path: Path) -> None:
    graphs = built.exported("int4-rtn")
    model, inputs = str(built.root / "int4-rtn" / "model"), built.case.inputs
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, model, inputs, str(tmp_path / "found.npz")],
        check=True,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    found: Mapping[str, NDArray[Any]] = np.load(tmp_path / "found.npz")
    expected = {
        f"{place}.{graph}.{name}": values
        for place, (graph, feed) in enumerate(INPUTS[inputs](graphs))
        for name, values in graphs.run(graph, feed).items()
    }
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
