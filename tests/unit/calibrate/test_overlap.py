"""Sets that share images or patients are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.calibrate.imageset import ImageSet, Sample
from exporter.calibrate.overlap import refuse_overlap
from exporter.calibrate.sets import open_set
from exporter.core.errors import InputRefused


def made(name: str, *rows: tuple[str, str, str]) -> ImageSet:
    samples = tuple(Sample(i, Path(i), p, "ct", "A caption.", (), sha) for i, p, sha in rows)
    return ImageSet(name, "0", "Describe.", samples)


def test_disjoint_sets_pass() -> None:
    refuse_overlap(made("a", ("1", "p1", "x")), made("b", ("1", "p2", "y")))


def test_shared_images_and_patients_are_named() -> None:
    one = made("a", ("1", "p1", "x"), ("2", "p2", "y"), ("5", "p5", "q"))
    with pytest.raises(InputRefused, match=r"'a' .*'b' share 1 images \(2 = 3\); expected none"):
        refuse_overlap(one, made("b", ("3", "p3", "y")))
    with pytest.raises(InputRefused, match=r"share 2 patients \(p1, p2\); expected none"):
        refuse_overlap(one, made("b", ("3", "p2", "z"), ("4", "p1", "w")))
    with pytest.raises(InputRefused, match=r"share 3 images \(.*\) and 3 patients \(p1, p2, p5\)"):
        refuse_overlap(one, one)


def test_the_message_stays_short() -> None:
    many = made("a", *((str(i), f"p{i}", str(i)) for i in range(500)))
    with pytest.raises(
        InputRefused, match=r"500 images \(0 = 0, 1 = 1, 2 = 2, \.\.\.\)"
    ) as refused:
        refuse_overlap(many, many)
    assert len(str(refused.value)) < 300


def test_the_shipped_sets_do_not_overlap() -> None:
    refuse_overlap(open_set("phantoms-calib"), open_set("phantoms-eval"))
