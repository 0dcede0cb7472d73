"""The functional block against transformers' LlamaDecoderLayer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from exporter.calibrate.blocks.llama import GROUPS, rotary_tables, run_block
from exporter.families.base import DecoderSpec
from exporter.families.specs.walked import block_tensors


def make_spec(heads: int, kv_heads: int, head_dim: int, theta: float) -> DecoderSpec:
    return DecoderSpec(
        *(48, 1, heads, kv_heads, head_dim, 80, 100, 1e-5, theta, 64),
        *("m.", "m.embed_tokens.weight", "m.norm.weight", "lm_head.weight", False),
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "theta"),
    [(4, 4, 12, 10000.0), (6, 2, 8, 100000.0), (3, 1, 24, 5e5)],
)
def test_block_equals_transformers(heads: int, kv_heads: int, head_dim: int, theta: float) -> None:
    spec = make_spec(heads, kv_heads, head_dim, theta)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    weights = dict(layer.state_dict())
    assert {f"m.layers.0.{n}" for n in weights} == {t.name for t in block_tensors(spec, 0)}

    hidden = torch.randn(17, 48)
    positions = torch.arange(17)[None]
    cos, sin = LlamaRotaryEmbedding(config)(hidden[None], positions)
    mask = torch.full((17, 17), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(
            hidden[None],
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=(cos, sin),
        )
    expected = expected[0] if isinstance(expected, tuple) else expected
    ours_cos, ours_sin = rotary_tables(spec, 30)
    assert torch.equal(ours_cos[:17], cos[0]) and torch.equal(ours_sin[:17], sin[0])
    with torch.inference_mode():
        out = run_block(spec, weights, hidden, (ours_cos, ours_sin))
    np.testing.assert_allclose(out, expected.reshape(17, 48), rtol=2e-5, atol=2e-5)


def test_observed_inputs_are_what_the_linears_of_transformers_see() -> None:
    spec = make_spec(4, 2, 12, 10000.0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(1)
    layer = LlamaDecoderLayer(config, 0).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({f"{name}.weight": args[0][0]})
            )
    hidden = torch.randn(9, 48)
    tables = rotary_tables(spec, 9)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        layer(hidden[None], attention_mask=mask, position_embeddings=tuple(t[None] for t in tables))
        found: dict[tuple[str, ...], torch.Tensor] = {}
        run_block(spec, layer.state_dict(), hidden, tables, lambda g, x: found.update({g: x}))
    assert set(found) == set(GROUPS)
    for group, x in found.items():
        for name in group:
            np.testing.assert_allclose(x, seen[name], rtol=1e-4, atol=1e-5)
