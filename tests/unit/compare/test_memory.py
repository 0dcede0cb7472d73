import resource
from pathlib import Path

import numpy as np

from exporter.compare.memory import peak_rss, reset_peak, unique_bytes


def test_peak_is_what_the_kernel_reports_otherwise() -> None:
    peak = peak_rss()
    assert peak is not None
    # ru_maxrss is never reset and both are counted in batches per thread: a few MB apart.
    assert peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 32e6
    assert peak > 10e6


def test_peak_and_unique_see_an_allocation() -> None:
    reset_peak()
    before, unique = peak_rss(), unique_bytes()
    block = np.ones(8_000_000)
    after, more = peak_rss(), unique_bytes()
    assert before is not None
    assert after is not None
    assert unique is not None
    assert more is not None
    assert after - before > 50e6
    assert more - unique > 50e6
    del block
    if reset_peak():
        lower = peak_rss()
        assert lower is not None
        assert lower < after - 50e6


def test_a_system_without_proc_says_nothing(tmp_path: Path) -> None:
    assert peak_rss(tmp_path) is None
    assert unique_bytes(tmp_path) is None
    assert not reset_peak(tmp_path / "missing")
