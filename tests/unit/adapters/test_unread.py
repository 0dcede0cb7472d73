"""Adapters of layers that no feature depends on: what training leaves at zero there is no defect."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.adapters.base import open_base
from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.adapters.unread import unread_tensors
from exporter.core.errors import InputRefused
from tests.support.adapters import load, write_adapter
from tests.support.tiny_llava import write_tiny_llava
from tests.support.tiny_moondream import write_tiny_moondream

LAST, FIRST = "vision_tower.encoder.layers.2.", "vision_tower.encoder.layers.0."


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose features are taken before the tower's last block, and an adapter on its queries."""
    root = tmp_path_factory.mktemp("llava")
    base = write_tiny_llava(root / "base")
    return base, write_adapter(base, root / "adapter", target_modules=["q_proj", "fc1"])


def silenced(adapter: Path, out: Path, where: str) -> Path:
    """A copy of the adapter whose B is zero in the modules that `where` finds."""
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    found = [name for name in tensors if re.search(where, name) and ".lora_B." in name]
    assert found
    save_file(tensors | {name: np.zeros_like(tensors[name]) for name in found}, path)
    return out


def test_they_are_what_torch_gives_no_gradient(llava: tuple[Path, Path]) -> None:
    base, _ = llava
    model = load(base)
    tower = model.model.vision_tower
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    chosen = tower(pixels, output_hidden_states=True).hidden_states[-2]
    chosen.square().sum().backward()
    dead = {n for n, p in tower.named_parameters() if p.grad is None}
    assert {f"model.vision_tower.{name}" for name in dead} == unread_tensors(open_base(base))


def test_moondream_s_are_its_region_head(tmp_path: Path) -> None:
    unread = unread_tensors(open_base(write_tiny_moondream(tmp_path)))
    assert unread
    assert all(name.startswith("model.region.") for name in unread)


def test_an_untrained_pair_of_theirs_merges(llava: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = llava
    adapter, out = silenced(trained, tmp_path / "adapter", re.escape(LAST)), tmp_path / "out"
    out.mkdir()
    proof = merge_adapters(base, [adapter], out)
    idle = [target.tensor for target in proof.targets if not target.changed_values]
    assert sorted(idle) == [f"model.{LAST}mlp.fc1.weight", f"model.{LAST}self_attn.q_proj.weight"]
    assert f"{len(proof.targets) - 2} weights changed" in proof.statement
    assert "2 that no graph reads are as they were" in proof.statement
    found = prove_logits(base, [adapter], out)
    assert found.base_difference is not None
    assert found.tolerance is not None
    assert found.base_difference > found.tolerance


@pytest.mark.parametrize("where", [re.escape(FIRST), "."])
def test_others_are_refused(where: str, llava: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = llava
    adapter, out = silenced(trained, tmp_path / "adapter", where), tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputRefused, match="changes nothing"):
        merge_adapters(base, [adapter], out)


def test_an_adapter_of_nothing_else_is_refused(llava: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = llava
    only = rf".*{re.escape(LAST)}self_attn\.q_proj"
    trained = write_adapter(base, tmp_path / "trained", target_modules=only)
    adapter, out = silenced(trained, tmp_path / "adapter", "."), tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputRefused, match="adapter changes nothing"):
        merge_adapters(base, [adapter], out)
