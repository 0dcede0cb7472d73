"""docs/fit.md is what its script writes."""

from __future__ import annotations

import re

from exporter.catalog.profiles import model_profiles, target_profiles
from tools.write_fit import PAGE, SCHEMES, render


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tools/write_fit.py"


def test_every_model_and_target_is_on_the_page():
    text = render()
    for target in target_profiles():
        assert text.count(f"| {target} ") == len(SCHEMES) + 1
    for name in model_profiles():
        rows = len(re.findall(rf"^\| {re.escape(name)} \|", text, re.MULTILINE))
        assert rows >= len(SCHEMES)


def test_a_model_too_large_is_marked_and_by_how_much():
    header, rows = None, {}
    for line in render().split("## fp16")[1].split("## int8")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "model":
            header = cells
        elif header and len(cells) == len(header):
            rows[cells[0]] = dict(zip(header, cells, strict=True))
    row = rows["llava-v1.6-mistral-7b"]
    # 15.1 GB of weights alone.
    assert float(row["jetson-orin-nano-8gb"]) < -10
    left, rate = row["a100-80gb"].split()
    assert 60 < float(left) < 65
    assert 100 < float(rate) < 2039 / 14.2
