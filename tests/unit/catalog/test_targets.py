"""Target profiles: every figure has a source, and figures that depend on each other agree."""

from __future__ import annotations

import pytest
import yaml

from exporter.catalog.profiles import find_target, read_profile, target_profiles
from exporter.catalog.schema import Label, Quantity, TargetProfile
from exporter.core.data import data_root
from exporter.core.errors import InputRefused
from exporter.runtimes.trt_api import OLDEST, parse_version

TARGETS = sorted(target_profiles())
GPUS = [name for name in TARGETS if find_target(name).compute_capability]
ASKED = {
    *("jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb", "jetson-thor"),
    *("t4", "l4", "a2", "a10", "l40s", "a100-40gb", "a100-80gb", "h100", "h200"),
    *("rtx-a2000-12gb", "rtx-a4000", "rtx-4000-ada", "rtx-6000-ada", "rtx-4090", "rtx-5090"),
    *("cpu-avx2", "cpu-avx512-vnni", "cpu-arm64-dotprod"),
}


def facts(target: TargetProfile) -> list[Quantity | Label]:
    memory = target.memory
    parts = (memory.total_gb, memory.system_gb, memory.display_gb) if memory else ()
    found = [*parts, target.bandwidth_gbs, target.compute_capability, *target.rates.values()]
    return [f for f in found if f]


def test_all_targets_are_there():
    assert ASKED <= set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_fact_has_a_source(name):
    for fact in facts(find_target(name)):
        assert len(fact.source) > 10
        if fact.confidence == "not re-read":
            assert fact.source.startswith("vendor data sheet, not re-read")
        elif fact.confidence == "read":
            assert fact.source.startswith("https://") or fact.source.startswith("http://")


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_says_what_a_plan_needs(name):
    target = find_target(name)
    assert target.memory is not None
    assert target.bandwidth_gbs is not None
    assert "fp16" in target.rates
    # What it multiplies in: everything with a rate, the type with the rate of fp16, and float32.
    assert set(target.precisions) - set(target.rates) <= {"bf16", "fp32"}
    assert set(target.rates) <= set(target.precisions)
    assert target.tensorrt is not None
    assert target.tensorrt.versions
    assert target.tensorrt.source.startswith("https://")
    # Turing is the oldest that TensorRT 10.5 and later build for.
    assert tuple(map(int, target.compute_capability.value.split("."))) >= (7, 5)


@pytest.mark.parametrize("name", GPUS)
def test_rates_are_dense_and_double_with_half_the_bits(name):
    """A sparse figure among dense ones would be twice too large."""
    rates = {k: v.value for k, v in find_target(name).rates.items()}
    ratio = rates["int8"] / rates["fp16"]
    # Consumer cards halve only float rates, for their float32 accumulation.
    assert ratio == pytest.approx(
        4 if name.startswith("rtx-4090") or name == "rtx-5090" else 2, rel=0.02
    )
    if "fp8" in rates:
        assert rates["fp8"] / rates["fp16"] == pytest.approx(2, rel=0.02)


def test_precisions_follow_the_architecture():
    for name in GPUS:
        target = find_target(name)
        capability = tuple(map(int, target.compute_capability.value.split(".")))
        assert ("fp8" in target.precisions) == (capability >= (8, 9))
        assert ("bf16" in target.precisions) == (capability >= (8, 0))
        assert ("fp4" in target.precisions) == (capability >= (10, 0))
        assert ("int4" in target.precisions) == (capability < (9, 0))


def test_the_least_tensorrt_follows_the_architecture():
    """None is older than the API this was written for; later architectures came with later releases."""
    for name in GPUS:
        target = find_target(name)
        capability = tuple(map(int, target.compute_capability.value.split(".")))
        least = {(12, 0): (10, 8), (11, 0): (10, 13, 2)}.get(capability, OLDEST)
        assert parse_version(target.tensorrt.least) == least
        assert target.tensorrt.versions[0] == str(least[0])
    assert find_target("rtx-5090").tensorrt.summary() == "10.8+"
    assert find_target("jetson-thor").tensorrt.summary() == "10.13.2+, 11"


def test_few_facts_have_no_page():
    """Those that were found nowhere, by name: none may be added without a look."""
    missing = [
        (name, fact.value)
        for name in TARGETS
        for fact in facts(find_target(name))
        if fact.confidence == "not re-read"
    ]
    assert missing == [("jetson-agx-orin-64gb", 204.8)]


def test_a_processor_multiplies_in_what_it_has_a_rate_for():
    for name in set(TARGETS) - set(GPUS):
        target = find_target(name)
        assert set(target.precisions) == set(target.rates)


def test_shared_memory_leaves_less_for_a_model():
    nano = find_target("jetson-orin-nano-8gb").memory
    assert nano.unified
    assert nano.usable_bytes == 5_200_000_000
    assert not find_target("t4").memory.unified


def test_device_names_belong_to_one_target():
    names = [device for t in target_profiles().values() for device in t.devices]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda c: c["memory"].update(total_gb=8), r"\$\.memory\.total_gb"),
        (lambda c: c["bandwidth_gbs"].pop("source"), r"missing required field `source`"),
        (lambda c: c["bandwidth_gbs"].update(value=0), r"\$\.bandwidth_gbs\.value"),
        (lambda c: c["rates"].update(int3=c["rates"]["int8"]), r"\$\.rates"),
        (lambda c: c["bandwidth_gbs"].update(confidence="sure"), r"'sure'"),
        (lambda c: c.update(vram=1), r"unknown field `vram`"),
        (lambda c: c["tensorrt"].pop("least"), r"missing required field `least`"),
        (lambda c: c["tensorrt"].update(least="ten"), r"\$\.tensorrt\.least"),
    ],
)
def test_a_wrong_target_is_refused_with_the_place(tmp_path, edit, place):
    source = data_root("profiles") / "targets" / "t4.yaml"
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    edit(content)
    path = tmp_path / "t4.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputRefused, match=place) as caught:
        read_profile(path, TargetProfile)
    assert "\n" not in str(caught.value)
