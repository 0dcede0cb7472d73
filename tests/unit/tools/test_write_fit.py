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


def test_measured_speeds_stay_within_the_bound_and_near_the_likely():
    rows = re.findall(
        r"^\| (\S+) \| ([\d.]+) \(>= ([\d.]+)\) \| ([\d.]+) \| \S+ \| ([\d.]+) \(>= ([\d.]+)\) \| "
        r"([\d.]+) \|",
        render(),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for model, *figures in rows:
        first, least, seen, token, fastest, written = map(float, figures)
        assert least < seen, model
        assert fastest < written, model
        assert 0.75 < first / seen < 1.25, model
        assert 0.75 < token / written < 1.25, model


def test_predicted_memory_is_near_the_measured():
    rows = re.findall(r"^\| (\S+) \| \S+ \| (\d+) \| (\d+) \| \S+% \|", render(), re.MULTILINE)
    assert len(rows) == 9 + 6 + 4
    for model, predicted, measured in rows:
        assert abs(int(predicted) / int(measured) - 1) < 0.15, model


def test_a_model_for_processors_has_no_figure_for_a_gpu():
    row = next(line for line in render().splitlines() if line.startswith("| bio-clinicalbert "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:] == ["CPU"] * (len(target_profiles()) - 3)
    assert all(float(cell) for cell in cells[1:4])


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
