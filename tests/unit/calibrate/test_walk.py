"""The walk against hooks on the whole torch model, on disk and in memory, killed and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.calibrate import statistics
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.calibrate.statistics import Accumulator, sampled_rows, token_weights
from exporter.calibrate.walk import INDEX, walk_decoder
from exporter.core.activations import InputStatistics
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.syncs import Syncs

Array = NDArray[np.float32]
NOTHING: dict[str, Array] = {}


class Recorder:
    """A visitor that notes what it sees and adds noise from a seed of the layer's number."""

    def __init__(self, noise: float = 0.0, stop_at: int | None = None) -> None:
        self.noise, self.stop_at = noise, stop_at
        self.layers: list[int] = []
        self.inputs: dict[str, InputStatistics] = {}
        self.weights: dict[str, Array] = {}
        self.changed: dict[str, Array] = {}

    def __call__(
        self, layer: int, weights: Mapping[str, Array], inputs: Mapping[str, InputStatistics]
    ) -> Mapping[str, Array]:
        if layer == self.stop_at:
            raise KeyboardInterrupt
        self.layers.append(layer)
        self.inputs |= inputs
        self.weights |= {n: w.copy() for n, w in weights.items()}
        if not self.noise:
            return {}
        rng = np.random.default_rng(layer)
        changed = {
            n: (w + self.noise * rng.standard_normal(w.shape)).astype(np.float32)
            for n, w in sorted(weights.items())
        }
        self.changed |= changed
        return changed


def hooked(model: Any, prompts: Sequence[EmbeddedPrompt]) -> dict[str, list[NDArray[np.float64]]]:
    """Inputs of every decoder linear of the torch model, by prompt."""
    seen: dict[str, list[NDArray[np.float64]]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".text_model.layers." in f".{name}":
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: seen.setdefault(f"{name}.weight", []).append(
                        args[0][0].numpy().astype(np.float64)
                    )
                )
            )
    with torch.inference_mode():
        for prompt in prompts:
            model.model.text_model(inputs_embeds=torch.from_numpy(prompt.embeds)[None])
    for hook in hooks:
        hook.remove()
    return seen


def assert_statistics(
    found: Mapping[str, InputStatistics],
    seen: Mapping[str, list[NDArray[np.float64]]],
    weights: Sequence[Array],
) -> None:
    assert found.keys() == seen.keys()
    w = np.concatenate(weights).astype(np.float64)
    for name, parts in seen.items():
        x = np.concatenate(parts)
        moment = (x * w[:, None]).T @ x / w.sum()
        scale = np.abs(moment).max()
        np.testing.assert_allclose(found[name].second_moment / scale, moment / scale, atol=2e-5)
        np.testing.assert_allclose(
            found[name].mean_abs, (np.abs(x) * w[:, None]).sum(0) / w.sum(), rtol=1e-4, atol=1e-6
        )
        assert found[name].tokens == len(x)


def test_statistics_are_those_of_the_whole_model(
    merged: Path, checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt]
) -> None:
    visitor = Recorder()
    walk_decoder(checkpoint, spec, prompts, visitor, threads=1)
    assert visitor.layers == [0, 1, 2]
    seen = hooked(TorchCaptioner(merged, threads=1).model, prompts)
    assert_statistics(visitor.inputs, seen, token_weights(prompts, balance=True))
    for name, values in visitor.weights.items():
        np.testing.assert_array_equal(values, checkpoint.float32(name))
    blocks = {n for n in checkpoint.tensors if n.startswith(f"{spec.prefix}layers.")}
    assert visitor.weights.keys() == blocks
    q, k = (visitor.inputs[f"{spec.prefix}layers.1.self_attn.{n}_proj.weight"] for n in "qk")
    assert q is k
    rows = sampled_rows(prompts)
    expected = [
        x[r]
        for x, r in zip(seen["model.text_model.layers.1.mlp.down_proj.weight"], rows, strict=True)
    ]
    down = visitor.inputs[f"{spec.prefix}layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(down.rows, np.concatenate(expected), rtol=1e-3, atol=1e-4)


def test_later_blocks_see_what_the_visitor_gave_back(
    merged: Path, checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt]
) -> None:
    visitor = Recorder(noise=0.03)
    walk_decoder(checkpoint, spec, prompts, visitor, threads=1, balance=False)
    model = TorchCaptioner(merged, threads=1).model
    # Statistics of a block are taken with its own weights, those before it changed.
    for layer in range(spec.layers):
        prefix = f"{spec.prefix}layers.{layer}."
        seen = {n: x for n, x in hooked(model, prompts).items() if n.startswith(prefix)}
        found = {n: s for n, s in visitor.inputs.items() if n.startswith(prefix)}
        assert_statistics(found, seen, [np.ones(p.length, np.float32) for p in prompts])
        changed = {n: v for n, v in visitor.changed.items() if n.startswith(prefix)}
        missing = model.load_state_dict(
            {n: torch.from_numpy(v) for n, v in changed.items()}, strict=False
        )
        assert not missing.unexpected_keys and len(changed) == 9


def assert_same(one: Recorder, other: Recorder) -> None:
    for name, statistics_ in one.inputs.items():
        np.testing.assert_array_equal(
            statistics_.second_moment, other.inputs[name].second_moment, err_msg=name
        )
        np.testing.assert_array_equal(statistics_.rows, other.inputs[name].rows)


def test_spilled_and_kept_walks_are_the_same(
    checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt], tmp_path: Path
) -> None:
    runs = [Recorder(0.02) for _ in range(3)]
    walk_decoder(checkpoint, spec, prompts, runs[0], threads=1)
    walk_decoder(checkpoint, spec, prompts, runs[1], threads=1, spill=tmp_path / "spill")
    walk_decoder(checkpoint, spec, prompts, runs[2], threads=1, keep=tmp_path / "keep")
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert not list((tmp_path / "spill").iterdir()) and not list((tmp_path / "keep").iterdir())


def test_a_killed_walk_goes_on_at_its_block(
    checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt], tmp_path: Path
) -> None:
    whole, first, second = Recorder(0.02), Recorder(0.02, stop_at=2), Recorder(0.02)
    walk_decoder(checkpoint, spec, prompts, whole, threads=1)
    with pytest.raises(KeyboardInterrupt):
        walk_decoder(checkpoint, spec, prompts, first, threads=1, keep=tmp_path)
    assert first.layers == [0, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer-00002", INDEX]
    assert walk_decoder(checkpoint, spec, prompts, second, threads=1, keep=tmp_path) == 2
    assert second.layers == [2]
    assert_same(second, whole)


def test_hidden_states_are_on_disk_before_the_walk_relies_on_them(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    syncs = Syncs(monkeypatch)
    walk_decoder(checkpoint, spec, prompts, Recorder(), threads=1, keep=tmp_path)
    assert [path for path, _ in syncs.renames] == [tmp_path / INDEX] * 3
    for layer, (path, synced) in enumerate(syncs.renames, 1):
        states = {tmp_path / f"layer-{layer:05d}" / f"{n:05d}.npy" for n in range(len(prompts))}
        assert states | {path} <= synced


@pytest.mark.parametrize(
    ("step", "visited"), [(2, [0, 1, 2]), (4, [0, 1, 2]), (6, [1, 2]), (11, [1, 2])]
)
def test_a_walk_killed_inside_a_pass_goes_on(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    tmp_path: Path,
    step: int,
    visited: list[int],
) -> None:
    """Steps of 3 prompts in 2 passes: 4 and 11 are amid writing the next block's inputs."""

    def kill(done: int, total: int, what: str = "") -> None:
        assert total == 18
        if done == step:
            raise KeyboardInterrupt

    whole, second = Recorder(0.02), Recorder(0.02)
    walk_decoder(checkpoint, spec, prompts, whole, threads=1)
    with pytest.raises(KeyboardInterrupt):
        walk_decoder(
            checkpoint, spec, prompts, Recorder(0.02), threads=1, keep=tmp_path, progress=kill
        )
    walk_decoder(checkpoint, spec, prompts, second, threads=1, keep=tmp_path)
    assert second.layers == visited
    assert_same(second, whole)
    assert not list(tmp_path.iterdir())


def test_states_of_another_walk_or_damaged_ones_are_refused(
    checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        walk_decoder(checkpoint, spec, prompts, Recorder(stop_at=1), threads=1, keep=tmp_path)
    with pytest.raises(InputRefused, match="of another model, calibration set or version"):
        walk_decoder(checkpoint, spec, prompts[:2], Recorder(), threads=1, keep=tmp_path)
    with pytest.raises(InputRefused, match="of another model, calibration set or version"):
        walk_decoder(checkpoint, spec, prompts, Recorder(), threads=1, keep=tmp_path, balance=False)
    state = tmp_path / "layer-00001" / "00001.npy"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(
        InputRefused, match="00001.npy: hidden states of an earlier run are damaged"
    ):
        walk_decoder(checkpoint, spec, prompts, Recorder(), threads=1, keep=tmp_path)


def test_refusals(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputRefused, match="no calibration prompts"):
        walk_decoder(checkpoint, spec, [], Recorder(), threads=1)
    wrong = replace(spec, intermediate_size=256)
    with pytest.raises(InputRefused, match=r"expected \[256, 64\] by config.json"):
        walk_decoder(checkpoint, wrong, prompts, Recorder(), threads=1)
    broken = replace(prompts[1], embeds=np.full_like(prompts[1].embeds, np.inf))
    with pytest.raises(
        InputRefused, match="block 0: the inputs of self_attn.q_proj.weight are not"
    ):
        walk_decoder(checkpoint, spec, [prompts[0], broken], Recorder(), threads=1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("U", (), {"free": 1000}))
    with pytest.raises(EnvironmentLacks, match="hidden states take"):
        walk_decoder(checkpoint, spec, prompts, Recorder(), threads=1, spill=tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "value", "message"),
    [
        ("self_attn.q_proj.weight", (64, 63), 0.0, "which the block lacks"),
        ("self_attn.z_proj.weight", (64, 64), 0.0, "which the block lacks"),
        ("self_attn.q_proj.weight", (64, 64), np.nan, "not as finite float32"),
    ],
)
def test_a_visitor_must_return_the_blocks_own_tensors(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    name: str,
    shape: tuple[int, int],
    value: float,
    message: str,
) -> None:
    def visit(layer: int, weights: Any, inputs: Any) -> Mapping[str, Array]:
        return {f"{spec.prefix}layers.0.{name}": np.full(shape, value, np.float32)}

    with pytest.raises(ValueError, match=message):
        walk_decoder(checkpoint, spec, prompts[:1], visit, threads=1)


def made_prompt(image: int, text: int) -> EmbeddedPrompt:
    places = np.arange(image + text) < image
    return EmbeddedPrompt(
        np.zeros((image + text, 4), np.float32),
        places,
        np.zeros(image + text, np.int64),
        slice(image + text - 1, image + text),
    )


def test_image_and_text_tokens_weigh_the_same() -> None:
    prompts = [made_prompt(90, 10), made_prompt(30, 20)]
    weights = token_weights(prompts, balance=True)
    image = sum(float(w[p.image_positions].sum()) for w, p in zip(weights, prompts, strict=True))
    total = sum(float(w.sum()) for w in weights)
    assert image == pytest.approx(75) and total == pytest.approx(150)
    assert all(float(w.min()) == 1 for w in token_weights(prompts, balance=False))
    for one_kind in ([made_prompt(0, 5)], [made_prompt(5, 0)]):
        assert [list(w) for w in token_weights(one_kind, balance=True)] == [[1.0] * 5]


def test_rows_are_drawn_from_every_prompt_and_kind() -> None:
    prompts = [made_prompt(90, 10), made_prompt(3, 50)]
    first, second = sampled_rows(prompts, rows=40)
    assert (first < 90).sum() == 10 and (first >= 90).sum() == 10
    assert (second < 3).sum() == 3 and (second >= 3).sum() == 10
    assert len(set(first)) == 20 and first.min() == 0 and first.max() == 99


def test_wide_sums_in_float32_are_those_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((50, 32)).astype(np.float32) * 10**i for i in range(-2, 2)] * 40
    weights = [rng.random(50).astype(np.float32) for _ in parts]
    monkeypatch.setattr(statistics, "DOUBLE_WIDTH", 16)
    narrow = Accumulator(32)
    for x, w in zip(parts, weights, strict=True):
        narrow.add(torch.from_numpy(x), torch.from_numpy(w), np.arange(2))
    found = narrow.result()
    x64, w64 = (np.concatenate(a).astype(np.float64) for a in (parts, weights))
    moment = (x64 * w64[:, None]).T @ x64 / w64.sum()
    np.testing.assert_allclose(found.second_moment / moment.max(), moment / moment.max(), atol=1e-5)
    assert found.rows.shape == (320, 32) and found.tokens == 8000
    with pytest.raises(ValueError, match="no inputs"):
        Accumulator(4).result()
