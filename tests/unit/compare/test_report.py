"""What the report and the words around figures promise."""

import re

import pytest

from exporter.compare.html import STYLE, table, text
from exporter.compare.records import Figure
from exporter.compare.wording import interval, megabytes, number, percent, small


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "quiet", "bad", "warn", "good"])
def test_every_text_colour_has_the_promised_contrast(scheme: int, ink: str) -> None:
    colours = re.findall(r"--(\w+): (#[0-9a-f]{3,6})", STYLE)
    half = len(colours) // 2
    palette = dict(colours[half * scheme : half * (scheme + 1)])
    assert contrast(palette[ink], palette["paper"]) >= 7
    if ink in ("ink", "quiet"):
        assert contrast(palette[ink], palette["soft"]) >= 7


def test_cells_are_escaped() -> None:
    assert "<script>" not in table("a", ("b", "c"), [("<script>", '"><img>')])
    assert text('<a href="x">') == "&lt;a href=&quot;x&quot;&gt;"


def test_a_share_below_one_is_never_shown_as_all() -> None:
    assert percent(1.0) == "100.0%"
    assert percent(0.99999, 2) == "99.99%"
    assert percent(None) == "-"


def test_numbers() -> None:
    assert small(0) == "0"
    assert small(0.0123) == "0.0123"
    assert small(1.234e-5) == "1.2e-05"
    assert megabytes(2_345_678) == "2.3"
    assert megabytes(345_678_901) == "346"
    assert megabytes(None) == number(None) == "-"


def test_an_interval_names_its_cases_and_what_is_unknown() -> None:
    known = Figure(0.012, -0.02, 0.04, 30, 9)
    assert interval(known, signed=True) == "+0.012 [-0.020, +0.040] (30 images, 9 patients)"
    assert interval(known, share=True) == "1.2 % [-2.0, 4.0] (30 images, 9 patients)"
    assert "unknown" in interval(Figure(0.5, None, None, 3, 1))
