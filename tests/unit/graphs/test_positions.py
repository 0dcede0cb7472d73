"""Position rows and rotary tables against the classes of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exporter.graphs.rotary import rotary_tables
from exporter.graphs.tower import position_ids


class Recorder(torch.nn.Module):
    ids: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return torch.zeros(*ids.shape, 1)


def torch_ids(patches: int) -> np.ndarray:
    config = Idefics3VisionConfig(
        hidden_size=1, image_size=patches, patch_size=1, num_attention_heads=1
    )
    embeddings = Idefics3VisionEmbeddings(config)
    embeddings.position_embedding = Recorder()
    with torch.no_grad():
        embeddings(
            torch.zeros(1, 3, patches, patches), torch.ones(1, patches, patches, dtype=torch.bool)
        )
    return embeddings.position_embedding.ids[0].numpy()


@pytest.mark.parametrize("patches", [1, 2, *range(4, 33), 36])
def test_position_ids_equal_those_of_transformers(patches: int) -> None:
    if patches in (19, 25, 29) and torch.backends.cpu.get_cpu_capability() == "AVX512":
        pytest.skip("torch itself computes other buckets for this grid with 16 lanes")
    np.testing.assert_array_equal(position_ids(patches), torch_ids(patches))


def test_rounding_moves_a_patch_for_some_grids_only() -> None:
    moved = [n for n in range(4, 37) if not np.array_equal(position_ids(n), np.arange(n * n))]
    assert moved == [19, 25, 29, 31]


@pytest.mark.parametrize("theta", [1e4, 1e5, 273768.0])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_rotary_tables_equal_llama(theta: float, head_dim: int) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(8192)[None])
    ours = rotary_tables(8192, head_dim, theta)
    # torch's pow is one rounding off for a few frequencies; 8191 positions out that is 6e-5.
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(mine, theirs[0, :, : head_dim // 2].numpy(), rtol=0, atol=7e-5)
        np.testing.assert_allclose(
            mine[:256], theirs[0, :256, : head_dim // 2].numpy(), rtol=0, atol=2.5e-6
        )
