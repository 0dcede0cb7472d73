"""Fit: tables that two graphs share, the second cache block of TensorRT, what runs on no GPU."""

from __future__ import annotations

import msgspec
import pytest

from exporter.catalog.profiles import find_model, find_target
from exporter.catalog.schema import Memory, Quantity
from exporter.core.errors import InputRefused
from exporter.families.shapes.find import shape_of
from exporter.pipeline.fit import predict, recommend, refuse_unfit
from exporter.pipeline.fit_memory import ALIGNMENT, SECOND_BLOCK, STEP, resident_weights
from exporter.pipeline.outlook import target_outlook
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes import trt_decoder
from exporter.runtimes.trt_memory import ALIGNMENT as DEVICE_ALIGNMENT

FINEST_FIRST = ("fp16", "int8", "int4-rtn", "int4-rtn-small")


def fit_of(name: str, scheme: str, target, **options):
    profile = find_model(name)
    return predict(profile, shape_of(profile), find_scheme(scheme), target, **options)


def with_memory(target: str, size: float):
    memory = Memory(total_gb=Quantity(size / 1e9, "a test's own", "assumed"))
    return msgspec.structs.replace(find_target(target), memory=memory)


def second_block(fit) -> int:
    return next(row.bytes for row in fit.memory if row.name == SECOND_BLOCK)


@pytest.mark.parametrize(
    ("name", "table", "inside"),
    [("qwen2-vl-2b-instruct", 151936 * 1536, 0), ("t5-small", 32128 * 512, 2)],
)
def test_a_shared_float_table_is_held_once_in_float32_on_a_cpu(name, table, inside):
    """Opening the graph of a mapped 134 MB table added 9 MB; of a 49 MB one inside its file, 57 MB."""
    shape, scheme = shape_of(find_model(name)), find_scheme("fp16")
    values = sum(w.parameters for w in shape.weights if w.part == "decoder")
    assert resident_weights(shape, scheme, cpu=True)["decoder"] == 4 * values + inside * table
    # On a GPU each session has its own.
    assert resident_weights(shape, scheme, cpu=False)["decoder"] == 2 * values + 2 * table


def test_a_second_cache_block_by_hand():
    fit = fit_of("llava-1.5-7b", "int4-rtn", find_target("t4"))
    place = 2 * 32 * 32 * 128 * 2
    assert fit.load.context == 736
    # A past of 3 x 256 places and a present of one more, less the one cache of 736.
    assert second_block(fit) == place * (768 + 769 - 736)
    assert fit.needed - fit.least == second_block(fit)
    three = fit_of("llava-1.5-7b", "int4-rtn", find_target("t4"), batch=3)
    assert second_block(three) == 3 * second_block(fit)
    host = fit_of("llava-1.5-7b", "int4-rtn", find_target("cpu-avx2"))
    assert host.needed == host.least


@pytest.mark.parametrize("name", ["demo", "qwen2-vl-2b-instruct", "moondream2", "medgemma-4b"])
def test_the_second_block_is_what_the_runtime_asks_for(name):
    fit, d = fit_of(name, "fp16", find_target("l4")), shape_of(find_model(name)).decoder
    layout = trt_decoder.CacheLayout(2 * d.layers, d.kv_heads, 2 * d.head_dim)
    places = trt_decoder.bucket(fit.load.context, d.max_positions - 1)
    both = layout.size(places) + layout.size(places + 1)
    assert second_block(fit) == both - 2 * d.cache_values(fit.load.context)
    assert (STEP, ALIGNMENT) == (trt_decoder.BUCKET, DEVICE_ALIGNMENT)


def test_what_fits_with_one_runtime_alone_is_no_fit_and_no_refusal():
    generous = fit_of("llava-1.5-7b", "int4-rtn", find_target("t4"))
    between = (generous.least + generous.needed) / 2
    machine = with_memory("t4", between)
    fit = fit_of("llava-1.5-7b", "int4-rtn", machine)
    assert fit.verdict == "does not fit"
    refuse_unfit(fit, [fit], here=False)
    smaller = fit_of("llava-1.5-7b", "int4-rtn", with_memory("t4", generous.least - 1e6))
    with pytest.raises(InputRefused, match="does not fit: int4-rtn needs about"):
        refuse_unfit(smaller, [smaller], here=False)
    profile = find_model("llava-1.5-7b")
    lines = target_outlook(profile, shape_of(profile), with_memory("t4", 5.2e9)).to_lines()
    assert any("with onnxruntime (CUDA) alone" in line for line in lines)


@pytest.mark.parametrize("name", ["clip-vit-base-patch32", "bio-clinicalbert", "t5-small", "cris"])
def test_what_does_not_caption_runs_on_no_gpu(name):
    rows = [fit_of(name, scheme, find_target("l4")) for scheme in FINEST_FIRST]
    assert {row.verdict for row in rows} == {"CPU only"}
    assert {row.limit for row in rows} == {row.likely for row in rows} == {None}
    found = recommend(rows)
    assert found.scheme is None
    assert "runs on the CPU only" in found.why
    assert recommend([fit_of(name, "fp16", find_target("cpu-avx2"))]).scheme == "fp16"


def test_static_int8_runs_on_no_gpu_and_the_rest_does():
    profile = find_model("smolvlm-500m")
    shape, static = shape_of(profile), find_scheme("int8-static")
    on_gpu = target_outlook(profile, shape, find_target("l4"), static)
    by_scheme = {fit.scheme: fit.verdict for fit in on_gpu.fits}
    assert by_scheme.pop("int8-static") == "CPU only"
    assert set(by_scheme.values()) == {"fits"}
    assert on_gpu.recommended.scheme == "fp16"
    assert "int8-static: int8-static is for CPUs; int8 runs on a GPU" in on_gpu.to_lines()
    on_cpu = target_outlook(profile, shape, find_target("cpu-avx2"), static)
    assert "CPU only" not in {fit.verdict for fit in on_cpu.fits}
