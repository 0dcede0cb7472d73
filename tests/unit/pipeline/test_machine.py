"""What this machine is: memory limits of cgroups, GPUs by name, Jetsons by their device tree."""

from __future__ import annotations

import os

import msgspec
import pytest

from exporter.catalog.profiles import find_target
from exporter.pipeline import machine
from exporter.pipeline.machine import (
    Gpu,
    gpu_target,
    jetson_target,
    read_smi,
    usable_memory,
    with_own_figures,
)
from exporter.pipeline.targets import choose_target, machine_targets
from exporter.runtimes.threads import usable_cores

TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group(tmp_path, line: str, files: dict[str, str]):
    """A cgroup tree with `files` by relative path, and this process's membership `line`."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    member = tmp_path / "self"
    member.write_text(line)
    return tmp_path / "cgroup", member


def test_a_limit_above_or_around_the_process_counts(tmp_path):
    limits = {"memory.max": "max\n", "a/memory.max": "2000000\n", "a/b/memory.max": "3000000\n"}
    assert usable_memory(*group(tmp_path, "0::/a/b\n", limits)) == 2_000_000


def test_version_one_limits(tmp_path):
    limits = {"memory/pod/memory.limit_in_bytes": "1000000\n", "cpu/pod/cpu.shares": "2"}
    assert usable_memory(*group(tmp_path, "3:memory:/pod\n2:cpu:/pod\n", limits)) == 1_000_000


def test_without_a_limit_all_memory_is_usable(tmp_path):
    assert usable_memory(*group(tmp_path, "0::/\n", {"memory.max": "max\n"})) == TOTAL
    assert usable_memory(tmp_path / "none", tmp_path / "none") == TOTAL


def test_a_membership_that_climbs_out_is_not_followed(tmp_path):
    (tmp_path / "memory.max").write_text("5\n")
    assert usable_memory(*group(tmp_path, "0::/../\n", {"x/memory.max": "7\n"})) == TOTAL


def test_auto_has_this_machines_cores_and_memory():
    target = choose_target("auto")
    assert target.cores == usable_cores()
    assert target.memory.total_gb.value == pytest.approx(usable_memory() / 1e9)
    assert target.memory.total_gb.confidence == "measured"


def test_rates_scale_with_cores(monkeypatch):
    profile = find_target("cpu-avx512-vnni")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert with_own_figures(profile).rates["int8"].value == 4 * profile.rates["int8"].value


def test_a_gpu_is_found_by_the_drivers_name_and_has_its_memory():
    target = gpu_target(Gpu("NVIDIA H200", 143771 * 2**20, "9.0"))
    assert target.name == "h200"
    assert target.memory.usable_bytes == 143771 * 2**20
    assert gpu_target(Gpu("NVIDIA Unknown 1", 1, "9.9")) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NVIDIA L4, 23034, 8.9\nNVIDIA L4, 23034, 8.9\n", Gpu("NVIDIA L4", 23034 * 2**20, "8.9")),
        ("", None),
        ("No devices were found\n", None),
        ("Orin (nvgpu), [N/A], 8.7\n", None),
    ],
)
def test_what_nvidia_smi_prints(text, found):
    assert read_smi(text) == found


@pytest.mark.parametrize(
    ("model", "gigabytes", "name"),
    [
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
            7.6,
            "jetson-orin-nano-8gb",
        ),
        ("NVIDIA Jetson AGX Orin Developer Kit\0", 62, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson Orin Nano 4GB\0", 3.6, None),
        ("Raspberry Pi 5 Model B\0", 8, None),
    ],
)
def test_jetsons_by_their_device_tree(tmp_path, monkeypatch, model, gigabytes, name):
    board = tmp_path / "model"
    board.write_text(model)
    monkeypatch.setattr(machine, "usable_memory", lambda: int(gigabytes * 1e9))
    found = jetson_target(board)
    assert (found.name if found else None) == name


def test_this_machine_lists_its_processor_last(monkeypatch):
    monkeypatch.setattr("exporter.pipeline.targets.find_gpu", lambda: Gpu("NVIDIA T4", 1, "7.5"))
    monkeypatch.setattr("exporter.pipeline.targets.jetson_target", lambda: None)
    assert [t.name for t in machine_targets()] == [choose_target("auto").name]
    monkeypatch.setattr("exporter.pipeline.targets.find_gpu", lambda: Gpu("Tesla T4", 1, "7.5"))
    assert [t.name for t in machine_targets()] == ["t4", choose_target("auto").name]


def test_profiles_stay_as_they_are_on_disk():
    before = msgspec.to_builtins(find_target("cpu-avx2"))
    with_own_figures(find_target("cpu-avx2"))
    assert msgspec.to_builtins(find_target("cpu-avx2")) == before
