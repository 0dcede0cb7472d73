"""Moondream2 in plain numpy and float64, from the description of the published code.

Written without a look at transformers' Phi and SigLIP: patches in the order channel, row, column;
fused matrices of all queries, all keys, all values; rotary halves read apart and written in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.tensors import Checkpoint
from tests.support.tiny_moondream import MARGIN, PATCH, SIDE, SIZES

Array = NDArray[np.float64]
GRID = SIDE // PATCH


def read_weights(folder: Path) -> dict[str, Array]:
    """All tensors of a float folder."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.float32(name).astype(np.float64) for name in checkpoint.tensors}


def logits(weights: Mapping[str, Array], ids: NDArray[np.int64], features: Array) -> Array:
    """Logits ``[length, vocab]`` of a prompt: start token, the image's rows, text."""
    prefix = 1 + len(features)
    x = weights["model.text.wte"][ids].copy()
    x[1:prefix] = features
    seen = np.tril(np.ones((len(ids), len(ids)), bool))
    seen[:prefix, :prefix] = True
    for layer in range(SIZES["text"]["n_layers"]):
        x = text_block(weights, f"model.text.blocks.{layer}.", x, seen)
    return linear(weights, "model.text.lm_head", norm(weights, "model.text.post_ln", x))


def text_block(weights: Mapping[str, Array], at: str, x: Array, seen: NDArray[np.bool_]) -> Array:
    """One decoder layer: attention and MLP of the same normed values."""
    heads = SIZES["text"]["n_heads"]
    normed = norm(weights, f"{at}ln", x)
    q, k, v = (split(part, heads) for part in thirds(linear(weights, f"{at}attn.qkv", normed)))
    attended = attention(rotated(q), rotated(k), v, seen)
    return x + linear(weights, f"{at}attn.proj", attended) + mlp(weights, f"{at}mlp.", normed)


def features(
    weights: Mapping[str, Array], pixels: NDArray[np.float32], tiling: tuple[int, int]
) -> Array:
    """Feature rows ``[rows, hidden]`` of crops ``[1 + rows * columns, 3, side, side]``."""
    rows = np.stack([tower(weights, crop.astype(np.float64)) for crop in pixels])
    crops = rows[1:].reshape(-1, GRID, GRID, rows.shape[-1])
    inner = GRID - 2 * MARGIN
    grid = np.zeros((*(n * inner + 2 * MARGIN for n in tiling), rows.shape[-1]))
    for number, crop in enumerate(crops):
        y, x = divmod(number, tiling[1])
        top, left = (0 if place == 0 else MARGIN for place in (y, x))
        # What a later crop covers too is written over by it, up to the margins it drops.
        grid[y * inner + top : y * inner + GRID, x * inner + left : x * inner + GRID] = crop[
            top:, left:
        ]
    local = np.zeros((GRID, GRID, rows.shape[-1]))
    for y in range(GRID):
        for x in range(GRID):
            lines, columns = bounds(y, grid.shape[0]), bounds(x, grid.shape[1])
            local[y, x] = grid[lines, columns].mean(axis=(0, 1))
    joined = np.concatenate([rows[0], local.reshape(GRID**2, -1)], axis=-1)
    return mlp(weights, "model.vision.proj_mlp.", joined)


def tower(weights: Mapping[str, Array], crop: Array) -> Array:
    """Rows ``[places, hidden]`` of one crop."""
    cut = crop.reshape(3, GRID, PATCH, GRID, PATCH).transpose(1, 3, 0, 2, 4)
    x = linear(weights, "model.vision.patch_emb", cut.reshape(GRID**2, -1))
    x = x + weights["model.vision.pos_emb"][0]
    for layer in range(SIZES["vision"]["enc_n_layers"]):
        at, heads = f"model.vision.blocks.{layer}.", SIZES["vision"]["enc_n_heads"]
        normed = norm(weights, f"{at}ln1", x)
        q, k, v = (split(part, heads) for part in thirds(linear(weights, f"{at}attn.qkv", normed)))
        all_seen = np.ones((len(x), len(x)), bool)
        x = x + linear(weights, f"{at}attn.proj", attention(q, k, v, all_seen))
        x = x + mlp(weights, f"{at}mlp.", norm(weights, f"{at}ln2", x))
    return norm(weights, "model.vision.post_ln", x)


def bounds(place: int, size: int) -> slice:
    """The places that an adaptive average to GRID places takes for one."""
    return slice(int(np.floor(place * size / GRID)), int(np.ceil((place + 1) * size / GRID)))


def rotated(x: Array) -> Array:
    """Heads ``[heads, length, width]``, the first half of each turned by its place."""
    width = x.shape[-1] // 2
    half = width // 2
    angles = np.arange(x.shape[1])[:, None] / 10000.0 ** (np.arange(half) * 2 / width)
    first, second = x[..., :half], x[..., half:width]
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return np.concatenate([turned.reshape(*x.shape[:-1], width), x[..., width:]], axis=-1)


def attention(q: Array, k: Array, v: Array, seen: NDArray[np.bool_]) -> Array:
    """Softmax attention of heads ``[heads, length, width]`` to the places that are seen."""
    scores = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = powers / powers.sum(axis=-1, keepdims=True) @ v
    out: Array = mixed.swapaxes(0, 1).reshape(q.shape[1], -1)
    return out


def mlp(weights: Mapping[str, Array], at: str, x: Array) -> Array:
    """Two layers with the tanh form of GELU between them."""
    wide = linear(weights, f"{at}fc1", x)
    active = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    return linear(weights, f"{at}fc2", active)


def linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """A layer with bias."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """Layer norm with epsilon 1e-5."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    out: Array = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return out


def thirds(x: Array) -> list[Array]:
    """All queries, all keys, all values."""
    return np.split(x, 3, axis=-1)


def split(x: Array, heads: int) -> Any:
    """Rows ``[length, hidden]`` as heads ``[heads, length, width]``."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)
