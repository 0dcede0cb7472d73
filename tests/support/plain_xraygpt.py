"""XrayGPT's image features out of its published tensors, formula by formula: no class of any library.

From the equations of EVA's ViT (arXiv 2211.07636) and BLIP-2's Q-Former (arXiv 2301.12597), with the
names and constants of the published code; float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import erf

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# torch's default, which ln_vision has; the tower's own norms; bert-base-uncased's.
LN_VISION, EVA, BERT = 1e-5, 1e-6, 1e-12


def image_features(
    tensors: Mapping[str, NDArray[np.float16]], pixels: Array, *, tower_heads: int, heads: int
) -> Array:
    """Rows ``[queries, decoder's width]`` for the image `pixels` ``[3, side, side]``."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    states = _norm(w, "ln_vision", _tower(w, pixels, tower_heads), LN_VISION)
    x = _norm(w, "Qformer.bert.embeddings.LayerNorm", w["query_tokens"][0], BERT)
    layer = 0
    while (at := f"Qformer.bert.encoder.layer.{layer}.") + "attention.self.query.weight" in w:
        x = _attended(w, f"{at}attention.", x, x, heads)
        if f"{at}crossattention.self.query.weight" in w:
            x = _attended(w, f"{at}crossattention.", x, states, heads)
        inner = _gelu(_linear(w, f"{at}intermediate_query.dense", x))
        x = _added(w, f"{at}output_query.", inner, x)
        layer += 1
    return _linear(w, "llama_proj", x)


def _tower(w: Mapping[str, Array], pixels: Array, heads: int) -> Array:
    kernel = w["visual_encoder.patch_embed.proj.weight"]
    side, grid = kernel.shape[-1], pixels.shape[-1] // kernel.shape[-1]
    cut = pixels[:, : grid * side, : grid * side].reshape(3, grid, side, grid, side)
    patches = cut.transpose(1, 3, 0, 2, 4).reshape(grid**2, -1)
    rows = patches @ kernel.reshape(len(kernel), -1).T + w["visual_encoder.patch_embed.proj.bias"]
    x = np.concatenate([w["visual_encoder.cls_token"][0], rows])
    x = x + w["visual_encoder.pos_embed"][0]
    block = 0
    while (at := f"visual_encoder.blocks.{block}.") + "norm1.weight" in w:
        normed = _norm(w, f"{at}norm1", x, EVA)
        query, key, value = (
            normed @ part.T for part in np.split(w[f"{at}attn.qkv.weight"], 3)
        )  # fmt: skip
        query, value = query + w[f"{at}attn.q_bias"], value + w[f"{at}attn.v_bias"]
        x = x + _linear(w, f"{at}attn.proj", _attention(query, key, value, heads))
        normed = _norm(w, f"{at}norm2", x, EVA)
        x = x + _linear(w, f"{at}mlp.fc2", _gelu(_linear(w, f"{at}mlp.fc1", normed)))
        block += 1
    return x


def _attended(w: Mapping[str, Array], at: str, x: Array, source: Array, heads: int) -> Array:
    parts = (("query", x), ("key", source), ("value", source))
    query, key, value = (_linear(w, f"{at}self.{name}", rows) for name, rows in parts)
    return _added(w, f"{at}output.", _attention(query, key, value, heads), x)


def _added(w: Mapping[str, Array], at: str, x: Array, residual: Array) -> Array:
    return _norm(w, f"{at}LayerNorm", _linear(w, f"{at}dense", x) + residual, BERT)


def _attention(query: Array, key: Array, value: Array, heads: int) -> Array:
    found = []
    for q, k, v in zip(
        *(np.split(part, heads, axis=1) for part in (query, key, value)), strict=True
    ):
        scores = q @ k.T / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    return np.concatenate(found, axis=1)


def _linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: Mapping[str, Array], name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
