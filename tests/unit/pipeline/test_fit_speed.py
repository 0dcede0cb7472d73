"""Fit: batches, windows, what is asked of a plan, and the likely speed beside measurements."""

from __future__ import annotations

import pytest

from exporter.catalog.profiles import find_model, find_target
from exporter.core.errors import InputRefused
from exporter.families.captioners import gemma3
from exporter.families.shapes.find import shape_of, shape_of_config
from exporter.pipeline.fit import predict, recommend, workload
from exporter.pipeline.fit_sizes import prefill_operations, token_bytes, token_operations
from exporter.pipeline.fit_speed import CPU_LIKELY, LIKELY, LIMIT, Load, likely_on, predict_speed
from exporter.quantizers.schemes import find_scheme
from tests.unit.pipeline.test_fit_memory import fit_of, with_memory
from tests.unit.test_profiles import nested


def test_a_caption_of_a_batch_takes_as_long_as_the_batch():
    shape, fp16 = shape_of(find_model("smolvlm-500m")), find_scheme("fp16")
    one, eight = (fit_of("smolvlm-500m", "fp16", find_target("l4"), batch=n) for n in (1, 8))
    positions = 1159 + 128
    cache = 2 * 32 * positions * 5 * 64 * 2
    # 70 % of 300 GB/s, 40 % of 121e12 operations a second.
    step = (token_bytes(shape, fp16) + 8 * cache) / (0.7 * 300e9)
    prefill = 8 * prefill_operations(shape, 1159) / (0.4 * 121e12)
    assert eight.likely.batch == 8
    assert eight.likely.tokens_per_s == pytest.approx(8 / step)
    assert eight.caption_s == pytest.approx(one.likely.vision_s + prefill + 128 * step)
    assert eight.caption_s == pytest.approx(0.908, abs=5e-4)
    assert one.caption_s == pytest.approx(0.565, abs=5e-4)


@pytest.mark.parametrize("name", ["bio-clinicalbert", "clip-vit-base-patch32", "medfilip"])
def test_an_encoder_takes_neither_batch_nor_context(name):
    shape = shape_of(find_model(name))
    assert workload(shape, 128, None, 1).context == 0
    for context, batch, option in ((100_000, 1, "--context 100000"), (None, 8, "--batch 8")):
        with pytest.raises(InputRefused, match=option) as caught:
            workload(shape, 128, context, batch)
        assert "\n" not in str(caught.value)


def test_a_context_that_does_not_hold_the_prompt_is_refused():
    shape = shape_of(find_model("smolvlm-500m"))
    with pytest.raises(InputRefused, match="--context 1158: the prompt alone takes 1159 positions"):
        workload(shape, 128, 1158, 1)
    assert workload(shape, 128, 1159, 1).context == 1159
    counts = {n: fit_of("smolvlm-500m", "fp16", find_target("l4"), context=n) for n in (1169, 8192)}
    assert {n: fit.new_tokens for n, fit in counts.items()} == {1169: 10, 8192: 128}


def test_windows_are_read_and_all_positions_kept():
    profile = find_model("medgemma-4b")
    shape, scheme, context = shape_of(profile), find_scheme("int4-rtn"), 100_000
    d = shape.decoder
    # Layers 6, 12, 18, 24 and 30 of 34 see everything; 4 heads of 256 for keys and for values.
    assert d.read_values(context) == 2 * 4 * 256 * (5 * context + 29 * 1024)
    assert d.cache_values(context) == 2 * 4 * 256 * 34 * context
    assert d.read_values(700) == d.cache_values(700)
    config = nested(profile)
    config = {**config, "text_config": {**config["text_config"], "model_type": "gemma3_text"}}
    assert sorted(d.windows) == sorted(w for w in gemma3.decoder_spec(config).windows if w)
    operations = token_operations(shape, context) - token_operations(shape, 0)
    assert operations == 4 * 8 * 256 * (5 * context + 29 * 1024)
    speed = predict_speed(shape, scheme, find_target("h200"), Load(292, context, 1), LIMIT)
    read = token_bytes(shape, scheme) + 2 * d.read_values(context)
    assert speed.tokens_per_s == pytest.approx(4800e9 / read)
    rows = predict(profile, shape, scheme, find_target("h200"), context=context).memory
    kept = next(row.bytes for row in rows if row.name == "key-value cache")
    assert kept == 2 * d.cache_values(context)


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, (512,) * 3),
        ({"_sliding_window_pattern": 2}, (512,) * 3),
        ({}, (512,) * 5),
    ],
)
def test_windows_of_a_folders_config(text, windows):
    sizes = {"num_hidden_layers": 6, "sliding_window": 512, "hidden_size": 64, "head_dim": 16}
    config = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": {**nested(find_model("medgemma-4b"))["text_config"], **sizes, **text},
        "vision_config": nested(find_model("medgemma-4b"))["vision_config"],
    }
    assert shape_of_config("t", "gemma3", config, {}).decoder.windows == windows


def test_processors_have_shares_of_their_own():
    assert likely_on(find_target("cpu-avx2")) == CPU_LIKELY
    assert likely_on(find_target("t4")) == LIKELY
    shape, scheme, load = shape_of(find_model("llava-1.5-7b")), find_scheme("fp16"), Load(9, 9, 1)
    fit = fit_of("llava-1.5-7b", "fp16", find_target("cpu-avx2"))
    read = token_bytes(shape, scheme) + 4 * shape.decoder.cache_values(fit.load.context)
    assert fit.likely.tokens_per_s == pytest.approx(CPU_LIKELY.bandwidth * 51.2e9 / read)
    limit = predict_speed(shape, scheme, find_target("cpu-avx2"), load, LIMIT)
    likely = predict_speed(shape, scheme, find_target("cpu-avx2"), load, CPU_LIKELY)
    assert likely.vision_s == pytest.approx(limit.vision_s / CPU_LIKELY.arithmetic)


def test_the_only_tight_scheme_and_one_of_several():
    schemes = ("int4-rtn", "int4-rtn-small")
    needed = [fit_of("llava-1.5-7b", name, find_target("t4")).needed for name in schemes]
    for size, words in ((needed[0], "one of those that may fit"), (needed[1], "the only one")):
        machine = with_memory("t4", size + 1e6)
        rows = [fit_of("llava-1.5-7b", name, machine) for name in schemes]
        found = recommend(rows)
        assert found.why.startswith(words)
        assert "within the prediction's error" in found.why
        assert found.scheme == (schemes[0] if words.startswith("one of") else schemes[1])


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("smolvlm-500m", "a caption"),
        ("t5-small", "a summary"),
        ("bio-clinicalbert", "a text"),
        ("medclip", "an image with its text"),
        ("cris", "an image with its text"),
    ],
)
def test_seconds_are_of_what_the_kind_does(name, does):
    found = recommend([fit_of(name, "int8", find_target("cpu-avx2"))])
    assert f" {does}" in found.why
    assert ("caption" in found.why) == (does == "a caption")
