"""Swin's windows, shifts and merging against transformers' own functions, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import SwinConfig
from transformers.models.swin import modeling_swin

from exporter.core.errors import InputRefused
from exporter.families.specs.swin import (
    merge_order,
    relative_index,
    shift_mask,
    swin_spec,
    window_order,
)


@pytest.mark.parametrize(
    ("side", "window", "shift"), [(8, 4, 0), (8, 4, 2), (14, 7, 3), (16, 4, 2)]
)
def test_one_gather_shifts_and_cuts(side, window, shift):
    grid = torch.arange(side**2).reshape(1, side, side, 1)
    rolled = torch.roll(grid, (-shift, -shift), (1, 2))
    windows = modeling_swin.window_partition(rolled, window)
    order = window_order(side, window, shift)
    assert order.tolist() == windows.reshape(-1).tolist()
    together = modeling_swin.window_reverse(windows, window, side, side)
    back = torch.roll(together, (shift, shift), (1, 2)).reshape(-1)
    assert order[np.argsort(order)].tolist() == back.tolist()


@pytest.mark.parametrize(("side", "window"), [(8, 4), (14, 7), (16, 4)])
def test_the_mask_keeps_regions_apart(side, window):
    config = SwinConfig(window_size=window, embed_dim=8, num_heads=[2], depths=[2])
    layer = modeling_swin.SwinLayer(config, 8, (side, side), 2, shift_size=window // 2)
    expected = layer.get_attn_mask(side, side, torch.float32, torch.device("cpu"))
    found = shift_mask(side, window, window // 2)
    np.testing.assert_array_equal(found[:, 0], expected.numpy())


@pytest.mark.parametrize("window", [4, 7])
def test_rows_of_relative_positions(window):
    bias = modeling_swin.SwinRelativePositionBias(2, (window, window))
    expected = bias.relative_position_index.reshape(window**2, window**2)
    np.testing.assert_array_equal(relative_index(window), expected.numpy())


def test_four_neighbours_are_merged_in_order():
    merging = modeling_swin.SwinPatchMerging(1)
    merging.norm, merging.reduction = torch.nn.Identity(), torch.nn.Identity()
    grid = torch.arange(36.0).reshape(1, 36, 1)
    expected = merging(grid, (6, 6))
    assert merge_order(6).reshape(9, 4).tolist() == expected[0].int().tolist()


def test_the_published_tower():
    spec = swin_spec({}, "", "vision_config")
    assert spec.output_size == 768
    assert [(s.side, s.width, len(s.blocks)) for s in spec.stages()] == [
        (56, 96, 2),
        (28, 192, 2),
        (14, 384, 6),
        (7, 768, 2),
    ]
    # Seven cells are one window: nothing left to shift.
    assert [{b.shift for b in s.blocks} for s in spec.stages()] == [{0, 3}] * 3 + [{0}]
    with torch.device("meta"):
        model = modeling_swin.SwinModel(SwinConfig())
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {t.name: t.shape for t in spec.tensors()} == expected


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_size": 384}, "expected whole windows"),
        ({"image_size": 112}, "expected whole windows"),
        ({"num_heads": [3, 6, 12]}, "4 depths, 3 num_heads"),
        ({"num_heads": [5, 6, 12, 24]}, "whole heads"),
        ({"depths": "2"}, "depths is '2'"),
        ({"use_absolute_embeddings": True}, "absolute positions"),
        ({"qkv_bias": False}, "attention without bias"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_other_towers_are_refused_in_one_line(changed, words):
    with pytest.raises(InputRefused, match=words) as caught:
        swin_spec(changed, "", "vision_config")
    assert "\n" not in str(caught.value)
