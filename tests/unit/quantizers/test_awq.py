"""AWQ against torch: folded scales leave a block's function alone, and lower the output error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat, dequantize
from exporter.families.base import DecoderSpec
from exporter.quantizers.awq import (
    FoldPair,
    awq_scales,
    clip_matrix,
    fold_into,
    fold_pairs,
    scaled_statistics,
)
from exporter.quantizers.block import fold_block, quantize_block
from exporter.quantizers.gptq import GptqSettings
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.schemes import Method
from tests.unit.quantizers.correlated import inputs, lost, statistics, weights

Array = NDArray[np.float32]
HIDDEN, INNER, HEADS, KEYS, WIDTH = 96, 160, 6, 2, 16
FMT = BlockFormat(4, 32, False)
SPEC = DecoderSpec(
    hidden_size=HIDDEN,
    layers=2,
    heads=HEADS,
    kv_heads=KEYS,
    head_dim=WIDTH,
    intermediate_size=INNER,
    vocab_size=100,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=128,
    prefix="model.",
    embedding="e",
    final_norm="n",
    head="h",
    tied=True,
)
AT = "model.layers.1."


@pytest.fixture(scope="module")
def block() -> tuple[dict[str, Array], dict[str, InputStatistics]]:
    """A block's tensors, and statistics of what each matrix reads, recorded by hooks in torch."""
    import torch

    torch.set_num_threads(1)
    layer = _torch_block()
    rng = np.random.default_rng(4)
    state = layer.state_dict()
    for tensor in state.values():
        wide = tensor.shape[-1] if tensor.ndim == 2 else 4
        noise = rng.standard_t(6, tuple(tensor.shape)) / np.sqrt(wide)
        tensor.copy_(torch.from_numpy(noise if tensor.ndim == 2 else 1 + noise))
    seen: dict[str, Array] = {}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _m, x, _y, name=name: seen.update({name: x[0].detach()[0].numpy().copy()})
            )
    _run(layer, inputs(HIDDEN, 1200))
    found = {AT + n: t.numpy().copy() for n, t in state.items()}
    return found, {f"{AT}{n}.weight": statistics(x) for n, x in seen.items()}


def _torch_block() -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=WIDTH,
        num_hidden_layers=2,
        attn_implementation="eager",
    )
    return LlamaDecoderLayer(config, 1).eval()


def _run(layer: Any, x: Array) -> Array:
    import torch

    states = torch.from_numpy(x)[None]
    angles = torch.arange(x.shape[0])[:, None] * 0.7 ** torch.arange(WIDTH // 2)
    turned = torch.cat((angles, angles), dim=-1)[None]
    with torch.no_grad():
        out = layer(states, position_embeddings=(turned.cos(), turned.sin()))
    return np.asarray((out[0] if isinstance(out, tuple) else out).reshape(x.shape).numpy())


def _loaded(tensors: dict[str, Array]) -> Any:
    import torch

    layer = _torch_block()
    layer.load_state_dict({n.removeprefix(AT): torch.from_numpy(t) for n, t in tensors.items()})
    return layer


def plans(tensors: dict[str, Array], method: Method) -> list[LayerPlan]:
    return [
        LayerPlan(n, "linear", t.shape, FMT, method, "", 0)
        if t.ndim == 2
        else LayerPlan(n, "float", t.shape, None, "none", "norm", 0)
        for n, t in tensors.items()
    ]


def test_folding_leaves_the_function_unchanged(
    block: tuple[dict[str, Array], dict[str, InputStatistics]],
) -> None:
    tensors, stats = block
    x = inputs(HIDDEN, 40, seed=9)

    folded = fold_block(1, SPEC, plans(tensors, "awq"), tensors, stats)

    for pair in fold_pairs(SPEC, 1):  # every pair has found scales worth having
        assert not np.array_equal(folded.weights[pair.source], tensors[pair.source])
        assert set(pair.readers) <= folded.scales.keys()
    before, after = _run(_loaded(tensors), x), _run(_loaded(folded.weights), x)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_folded_norms_are_float16(
    block: tuple[dict[str, Array], dict[str, InputStatistics]],
) -> None:
    folded = fold_block(1, SPEC, plans(block[0], "awq"), *block)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        norm = folded.weights[AT + name]
        assert np.array_equal(norm, norm.astype(np.float16).astype(np.float32))


def test_heads_that_share_values_share_scales(
    block: tuple[dict[str, Array], dict[str, InputStatistics]],
) -> None:
    folded = fold_block(1, SPEC, plans(block[0], "awq"), *block)
    scales = folded.scales[AT + "self_attn.o_proj.weight"].reshape(KEYS, HEADS // KEYS, WIDTH)
    assert np.all(scales == scales[:, :1])
    assert not np.all(scales[0] == scales[1])


@pytest.mark.parametrize("method", ["gptq", "hqq", "rtn-mse", "rtn"])
def test_methods_without_scales_fold_nothing(
    block: tuple[dict[str, Array], dict[str, InputStatistics]], method: Method
) -> None:
    folded = fold_block(1, SPEC, plans(block[0], method), *block)
    assert folded.scales == {}
    assert all(folded.weights[n] is w for n, w in block[0].items())


def test_the_block_gets_closer_to_the_float_one(
    block: tuple[dict[str, Array], dict[str, InputStatistics]],
) -> None:
    tensors, stats = block
    x = inputs(HIDDEN, 1280)[1200:]  # of the calibration's kind, but not among it
    truth = _run(_loaded(tensors), x)
    errors = {}
    methods: tuple[Method, ...] = ("rtn", "awq", "gptq", "awq+gptq")
    for method in methods:
        done = quantize_block(1, SPEC, plans(tensors, method), tensors, stats, GptqSettings())
        changed = {n: dequantize(m) for n, m in done.packed.items()} | done.floats
        errors[method] = float(np.linalg.norm(_run(_loaded(tensors | changed), x) - truth))
        row = done.notes[AT + "mlp.down_proj.weight"]
        assert 0 < row["output_error"] < 0.3
        assert row["outliers"]["of"] == "inputs"
    assert errors["awq"] < 0.95 * errors["rtn"]
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["awq+gptq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_and_clipping_lower_the_output_error(symmetric: bool) -> None:
    x, w, fmt = inputs(128, 600), weights(64, 128), BlockFormat(4, 32, symmetric)
    stats = statistics(x)

    found = awq_scales([w], fmt, stats)

    plain = lost(w, dequantize(quantize_matrix(w, fmt, search=False)), x)
    scaled = lost(
        w, dequantize(quantize_matrix(w * found.scales, fmt, search=False)) / found.scales, x
    )
    inner = clip_matrix(w * found.scales, fmt, scaled_statistics(stats, found.scales))
    both = lost(w, dequantize(inner) / found.scales, x)
    assert found.plain == pytest.approx(plain, rel=1e-3)
    assert found.error == pytest.approx(scaled, rel=1e-3)
    assert both < scaled < plain


def test_scaled_statistics_are_those_of_scaled_inputs() -> None:
    x = inputs(64, 200)
    scales = np.random.default_rng(1).uniform(0.2, 5, 64).astype(np.float32)

    found, expected = scaled_statistics(statistics(x), scales), statistics(x / scales)

    np.testing.assert_allclose(found.second_moment, expected.second_moment, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.mean_abs, expected.mean_abs, rtol=1e-4)
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-5)


def test_a_norm_that_float16_cannot_divide_is_left_alone() -> None:
    norm = np.array([1.0, 0.0, 1e-6, 3.0], np.float32)
    scales = np.array([1e-5, 2.0, 1e4, 3.0], np.float32)

    folded, exact = fold_into(norm, scales, FoldPair("n", ("q",)))

    assert folded.tolist() == [1.0, 0.0, pytest.approx(1e-6), 1.0]
    assert exact.tolist() == [1.0, 1.0, 1.0, 3.0]
