"""Usable cores: affinity and cgroup quotas, with made-up cgroup trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.runtimes.threads import usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def tree(root: Path, files: dict[str, str], membership: str = "0::/") -> tuple[Path, Path]:
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(text)
    (root / "cgroup").write_text(membership + "\n")
    return root / "fs", root / "cgroup"


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, "0::/", 8),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "5000 100000"}, "0::/", 1),
        ({"cpu.max": "1600000 100000"}, "0::/", 8),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 1),
        ({"other/cpu.max": "100000 100000"}, "0::/a/b", 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "0::/", 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "0::/", 8),
        (
            {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "50000"},
            "4:cpu,cpuacct:/x",
            5,
        ),
        ({"cpu.max": "nonsense"}, "garbage", 8),
        ({"cpu.max": "100000 100000"}, "0::/../../escape", 1),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], membership: str, expected: int) -> None:
    (tmp_path / "fs").mkdir()
    assert usable_cores(*tree(tmp_path, files, membership)) == expected


def test_affinity_is_a_bound_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(*tree(tmp_path, {"cpu.max": "400000 100000"})) == 1
