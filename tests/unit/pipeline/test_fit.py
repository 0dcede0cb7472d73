"""Fit: sizes by hand arithmetic, the roofline, the recommendation, and refusals."""

from __future__ import annotations

import math

import msgspec
import pytest

from exporter.catalog.profiles import find_model, find_target
from exporter.catalog.schema import Memory, Quantity
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.families.checkpoints import modern_config
from exporter.families.shapes.find import shape_of
from exporter.families.table import FAMILIES, TASK_FAMILIES
from exporter.families.tasks import task_tensors
from exporter.graphs import writer
from exporter.pipeline.fit import predict, recommend, refuse_unfit, workload
from exporter.pipeline.fit_memory import INLINE_LIMIT, KERNEL, resident_weights
from exporter.pipeline.fit_sizes import (
    prefill_operations,
    stored,
    token_bytes,
    token_operations,
    tower_operations,
    weight_bytes,
)
from exporter.pipeline.fit_speed import LIKELY, LIMIT, Load, predict_speed
from exporter.quantizers.packing import packed_bytes
from exporter.quantizers.plan import fit_block
from exporter.quantizers.schemes import SCHEMES, find_scheme
from tests.unit.test_profiles import nested
from tools.write_fit import CONVOLUTIONAL

FINEST_FIRST = ("fp16", "int8", "int4-rtn", "int4-rtn-small")
NANO = "jetson-orin-nano-8gb"


def fits(model: str, target: str, **options: int):
    profile, machine = find_model(model), find_target(target)
    shape = shape_of(profile)
    return [predict(profile, shape, find_scheme(n), machine, **options) for n in FINEST_FIRST]


def with_memory(target: str, gigabytes: float):
    memory = Memory(total_gb=Quantity(gigabytes, "a test's own", "assumed"))
    return msgspec.structs.replace(find_target(target), memory=memory)


def by_plan(name: str, scheme: str) -> int:
    """Bytes by the quantizers' own plan of every tensor that the family says there is."""
    profile, chosen = find_model(name), find_scheme(scheme)
    family, config = FAMILIES[profile.family], nested(profile)
    decoder, tower = family.decoder_spec(config), family.tower_spec(config)
    formats = {
        "decoder": chosen.decoder,
        "vision": chosen.vision,
        "head": chosen.head,
        "embedding": chosen.embedding,
        "float": None,
    }
    total = 0
    for tensor in (*decoder.tensors(), *tower.tensors()):
        size = 1
        for axis in tensor.shape:
            size *= axis
        fmt = formats[tensor.role]
        fmt = fit_block(tensor.shape[1], fmt, whole=tensor.role == "embedding") if fmt else None
        total += packed_bytes(*tensor.shape, fmt) if fmt else 2 * size
    return total


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4-rtn", "int4-rtn-small"])
@pytest.mark.parametrize(
    "name", ["demo", "smolvlm-256m", "smolvlm-500m", "smolvlm-2.2b", "cnn-transformer"]
)
def test_weight_bytes_are_those_of_the_quantizers_plan(name, scheme):
    assert weight_bytes(shape_of(find_model(name)), find_scheme(scheme)) == by_plan(name, scheme)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4-rtn"])
@pytest.mark.parametrize(
    "name", ["cris", "medfilip", "medclip", "clip-vit-base-patch32", "t5-small"]
)
def test_weight_bytes_of_a_task_are_those_of_the_quantizers_plan(name, scheme):
    profile, chosen = find_model(name), find_scheme(scheme)
    config = {**nested(profile), "text_config": dict(nested(profile)["text_config"])}
    config["text_config"].pop("model_type")
    total = 0
    for tensor in task_tensors(TASK_FAMILIES[profile.family], modern_config(config)):
        shape = tensor.shape[::-1] if tensor.turned else tensor.shape
        form = {"decoder": chosen.decoder, "vision": chosen.vision}.get(tensor.role)
        form = chosen.embedding if tensor.role == "embedding" else form
        if form is not None and len(shape) == 2:
            form = fit_block(shape[1], form, whole=tensor.role == "embedding")
        total += packed_bytes(*shape, form) if form else 2 * math.prod(shape)
    assert weight_bytes(shape_of(profile), chosen) == total


@pytest.mark.parametrize("name", ["smolvlm-500m", "qwen2-vl-2b-instruct", "idefics-9b-instruct"])
def test_float16_takes_two_bytes_a_value(name):
    shape = shape_of(find_model(name))
    assert weight_bytes(shape, find_scheme("fp16")) == 2 * shape.parameters


def test_a_shared_table_is_as_fine_as_the_finer_use():
    shape = shape_of(find_model("qwen2-vl-2b-instruct"))
    (table,) = [s for s in stored(shape, find_scheme("int4-rtn")) if s.weights.role == "embedding"]
    assert table.format.bits == 8
    assert table.bytes == 151936 * (1536 + 2 * 12)


def test_token_bytes_leave_out_what_is_looked_up():
    shape = shape_of(find_model("llava-1.5-7b"))
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert token_bytes(shape, find_scheme("fp16")) == 2 * (layers + 32064 * 4096)


def test_operations_by_hand():
    shape = shape_of(find_model("llava-1.5-7b"))
    layers, width, inner = 32, 4096, 11008
    each = 2 * layers * (4 * width**2 + 3 * width * inner)
    head = 2 * 32064 * width
    causal = layers * 4 * 600**2 * width // 2
    assert prefill_operations(shape, 600) == 600 * each + causal + head
    assert token_operations(shape, 600) == each + head + layers * 4 * 600 * width
    tower = 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024)
    projector = 2 * 576 * (1024 * 4096 + 4096**2)
    assert tower_operations(shape) == tower + projector


def test_siglip_operations_are_near_the_known_figure():
    """About 190e9 operations for one 512-pixel tile of SigLIP-B/16; without the patch kernel."""
    shape = shape_of(find_model("smolvlm-500m"))
    assert tower_operations(shape) / shape.tower.tiles == pytest.approx(2.15e11, rel=0.03)


def test_windows_and_prefixes_cost_what_they_attend():
    both = shape_of(find_model("moondream2")).decoder
    assert both.quadratic
    moon = shape_of(find_model("moondream2"))
    plain = prefill_operations(moon, 100) - prefill_operations(moon, 50)
    assert plain > 0


def test_the_roofline_is_bandwidth_over_bytes():
    shape, scheme = shape_of(find_model("llava-1.5-7b")), find_scheme("fp16")
    speed = predict_speed(shape, scheme, find_target("t4"), Load(600, 700, 1), LIMIT)
    cache = 2 * 2 * 32 * 700 * 4096
    assert speed.tokens_per_s == pytest.approx(320e9 / (token_bytes(shape, scheme) + cache))
    assert speed.bound_by == "memory"
    assert speed.prefill_s == pytest.approx(prefill_operations(shape, 600) / 65e12)
    assert speed.vision_s == pytest.approx(tower_operations(shape) / 65e12)
    likely = predict_speed(shape, scheme, find_target("t4"), Load(600, 700, 1), LIKELY)
    assert likely.tokens_per_s == pytest.approx(speed.tokens_per_s * LIKELY.bandwidth)
    assert likely.prefill_s == pytest.approx(speed.prefill_s / LIKELY.arithmetic)


def test_many_texts_are_bound_by_arithmetic():
    shape, scheme = shape_of(find_model("llava-1.5-7b")), find_scheme("int4-rtn")
    one = predict_speed(shape, scheme, find_target("a2"), Load(600, 700, 1), LIMIT)
    many = predict_speed(shape, scheme, find_target("a2"), Load(600, 0, 512), LIMIT)
    assert one.bound_by == "memory"
    assert many.bound_by == "arithmetic"
    assert many.tokens_per_s > 10 * one.tokens_per_s


def test_a_measured_rate_is_not_lowered_again():
    shape, scheme = shape_of(find_model("smolvlm-500m")), find_scheme("fp16")
    target, load = find_target("cpu-avx512-vnni"), Load(1000, 1100, 1)
    assert target.rates["fp32"].confidence == "measured"
    limit, likely = (predict_speed(shape, scheme, target, load, e) for e in (LIMIT, LIKELY))
    assert limit == likely


@pytest.mark.parametrize("target", ["cpu-avx2", "t4", NANO])
def test_memory_grows_with_context_and_batch_and_shrinks_with_bits(target):
    few = fits("qwen2-vl-2b-instruct", target)
    needed = [f.needed for f in few]
    assert needed == sorted(needed, reverse=True)
    longer = fits("qwen2-vl-2b-instruct", target, context=8192)
    item = 4 if target.startswith("cpu") else 2
    grown = 2 * 28 * 2 * 128 * (8192 - few[0].load.context) * item
    assert longer[0].least - few[0].least == grown
    assert (longer[0].needed - few[0].needed > grown) == (item == 2)
    double = fits("qwen2-vl-2b-instruct", target, batch=2)
    assert double[0].needed > few[0].needed


def test_a_cpu_holds_float_weights_in_float32():
    (cpu, *_), (gpu, *_) = (
        fits("qwen2-vl-2b-instruct", "cpu-avx2"),
        fits("qwen2-vl-2b-instruct", "t4"),
    )
    assert cpu.memory[0].bytes == 2 * gpu.memory[0].bytes


def test_a_convolution_is_kept_in_several_forms_on_a_cpu():
    shape = shape_of(find_model("medfilip"))
    kernels = sum(w.parameters for w in shape.weights if w.convolution)
    rest = sum(w.parameters for w in shape.weights if w.part == "vision") - kernels
    scheme = find_scheme("fp16")
    assert resident_weights(shape, scheme, cpu=True)["vision"] == KERNEL * kernels + 4 * rest
    assert resident_weights(shape, scheme, cpu=False)["vision"] == 2 * (kernels + rest)


@pytest.mark.parametrize(("target", "item"), [("cpu-avx2", 4), ("t4", 2)])
def test_activations_of_convolutions_are_their_feature_maps(target, item):
    profile, scheme = find_model("medfilip"), find_scheme("int8")
    shape = shape_of(profile)
    rows = {row.name: row for row in predict(profile, shape, scheme, find_target(target)).memory}
    assert rows["activations: vision part"].bytes == item * (64 + 2 * 256) * 112**2
    assert rows["activations: vision part"].how == "feature maps of 448 x 448 pixels"
    small = msgspec.structs.replace(
        profile,
        facts=msgspec.structs.replace(
            profile.facts, inferred={**profile.facts.inferred, "vision_config.image_size": 224}
        ),
    )
    quarter = predict(small, shape_of(small), scheme, find_target("t4")).memory
    (row,) = [r for r in quarter if r.name == "activations: vision part"]
    assert row.bytes * 4 == 2 * (64 + 2 * 256) * 112**2


def test_opening_a_graph_counts_where_running_takes_less():
    profile = find_model("cnn-transformer")
    shape = shape_of(profile)

    def opening(scheme: str) -> tuple[int, int]:
        fit = predict(profile, shape, find_scheme(scheme), find_target("cpu-avx2"))
        rows = {row.name: row.bytes for row in fit.memory}
        names = ("key-value cache", "activations: vision part", "activations: prefill", "pixels")
        return rows["opening a graph"], sum(rows[name] for name in names)

    more, running = opening("fp16")
    decoder = [w for w in shape.weights if w.part == "decoder" and w.role != "embedding"]
    # The file in float16, and the head again in float32.
    assert more + running == 2 * sum(w.parameters for w in decoder) + 4 * 30522 * 512
    assert opening("int8")[0] < more
    large = fits("smolvlm-500m", "cpu-avx2")
    assert not [row for fit in large for row in fit.memory if row.name == "opening a graph"]
    assert INLINE_LIMIT == writer.INLINE_LIMIT


@pytest.mark.parametrize(("name", "scheme", "measured"), CONVOLUTIONAL)
def test_memory_of_convolutional_models_is_near_the_measured(name, scheme, measured):
    profile = find_model(name)
    found = predict(profile, shape_of(profile), find_scheme(scheme), find_target("cpu-avx2"))
    assert found.needed / 1e6 == pytest.approx(measured, rel=0.15)


def test_a_7b_model_on_an_orin_nano():
    by_scheme = {f.scheme: f for f in fits("llava-v1.6-mistral-7b", NANO)}
    assert by_scheme["fp16"].verdict == by_scheme["int8"].verdict == "does not fit"
    assert by_scheme["fp16"].needed > 15e9
    # 68 GB/s over 4 GB a token.
    assert 10 < by_scheme["int4-rtn"].limit.tokens_per_s < 18


def test_a_context_beyond_the_model_is_refused():
    shape = shape_of(find_model("moondream2"))
    with pytest.raises(InputRefused, match="--context 4096: the model has 2048 positions"):
        workload(shape, 128, 4096, 1)


def test_the_finest_that_fits_and_is_fast_is_recommended():
    assert recommend(fits("smolvlm-256m", "rtx-4090")).scheme == "fp16"
    crowded = [
        predict(
            find_model("llava-1.5-7b"),
            shape_of(find_model("llava-1.5-7b")),
            find_scheme(name),
            with_memory("rtx-4090", 12),
        )
        for name in FINEST_FIRST
    ]
    found = recommend(crowded)
    assert found.scheme == "int8"
    assert "fp16 does not fit" in found.why


def test_nothing_is_recommended_where_nothing_fits():
    profile = find_model("llava-1.5-7b")
    tight = with_memory("a2", 2)
    none = [predict(profile, shape_of(profile), find_scheme(n), tight) for n in FINEST_FIRST]
    found = recommend(none)
    assert found.scheme is None
    assert found.why.startswith("none fits: int4-rtn-small needs least")


def test_tight_is_only_taken_when_there_is_nothing_else():
    profile, shape = find_model("smolvlm-500m"), shape_of(find_model("smolvlm-500m"))
    needed = predict(profile, shape, find_scheme("int4-rtn-small"), find_target("t4")).needed
    machine = with_memory("t4", needed * 1.01 / 1e9)
    rows = [predict(profile, shape, find_scheme(n), machine) for n in FINEST_FIRST]
    assert [f.verdict for f in rows][-1] == "tight"
    found = recommend(rows)
    assert found.scheme == "int4-rtn-small"
    assert "within the prediction's error" in found.why


def test_a_build_that_cannot_fit_is_refused_in_one_line():
    rows = fits("llava-v1.6-mistral-7b", NANO)
    with pytest.raises(InputRefused, match=r"fp16 needs about 16\.\d\d GB on jetson-orin-nano-8gb"):
        refuse_unfit(rows[0], rows, here=False)
    with pytest.raises(EnvironmentLacks) as caught:
        refuse_unfit(rows[0], rows, here=True)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_the_refusal_names_a_scheme_that_fits():
    rows = fits("llava-1.5-7b", "rtx-a2000-12gb")
    with pytest.raises(InputRefused, match="build int8"):
        refuse_unfit(rows[0], rows, here=False)
    refuse_unfit(rows[1], rows, here=False)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_every_scheme_can_be_predicted(name):
    profile = find_model("smolvlm-500m")
    fit = predict(profile, shape_of(profile), find_scheme(name), find_target("l4"))
    assert 0 < fit.weight_bytes < fit.needed
    if name == "int8-static":
        assert fit.verdict == "CPU only"
        assert fit.limit is None
        return
    assert fit.limit.tokens_per_s >= fit.likely.tokens_per_s > 0
