"""The curve in the report: every point in picture and table, and nothing broken is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from exporter.compare.tradeoff import (
    HEIGHT,
    WIDTH,
    Point,
    TradeOff,
    picture,
    read_tradeoff,
    tradeoff_section,
)
from exporter.core.errors import InputRefused

NAMESPACE = "{http://www.w3.org/2000/svg}"
POINTS = (
    Point("hull 1", "hull", 900_000, 0.2, 0.25),
    Point("hull 2", "hull", 1_300_000, 0.01, 0.012),
    Point("hull 3", "hull", 2_000_000, 1e-4, 2e-4),
    Point("uniform <int4>", "uniform", 1_200_000, 0.05, 0.04),
    Point("chosen", "chosen", 1_190_000, 0.02, 0.018),
)
CURVE = TradeOff(1, 3_000_000, "mean KL in nats per token", POINTS)


def parsed(text: str) -> ElementTree.Element:
    # In a page the namespace is implied.
    return ElementTree.fromstring(text.replace("<svg ", f'<svg xmlns="{NAMESPACE[1:-1]}" ', 1))


def test_the_picture_has_every_point_where_it_belongs() -> None:
    root = parsed(picture("mixed", CURVE))
    dots = root.findall(f"{NAMESPACE}circle")
    assert len(dots) == 3 and len(root.findall(f"{NAMESPACE}rect")) == 1
    across = [float(dot.attrib["cx"]) for dot in dots]
    down = [float(dot.attrib["cy"]) for dot in dots]
    assert across == sorted(across) and down == sorted(down)
    # Bytes on a linear axis, KL on a logarithmic one.
    assert (across[1] - across[0]) / (across[2] - across[0]) == pytest.approx(4 / 11, abs=1e-3)
    decades = down[1] - down[0], down[2] - down[0]
    assert decades[0] / decades[1] == pytest.approx(1.3188 / 3.0969, abs=1e-3)
    inside = [0 < x < WIDTH for x in across] + [0 < y < HEIGHT for y in down]
    assert all(inside)
    line = root.find(f"{NAMESPACE}polyline")
    assert line is not None and len(line.attrib["points"].split()) == 3


def test_it_says_what_it_shows() -> None:
    root = parsed(picture("mixed", CURVE))
    assert root.attrib["role"] == "img"
    said = root.attrib["aria-label"]
    assert "0.25 nats at 0.9 MB" in said and "2.0e-04 nats at 2.0 MB" in said
    words = [node.text or "" for node in root.iter(f"{NAMESPACE}text")]
    assert "megabytes of weights" in words and "measured KL, nats per token" in words
    assert "uniform <int4>" in words and "chosen" in words
    assert "1e-1" in words


def test_the_table_beside_it_has_all_figures() -> None:
    section = tradeoff_section("mixed", CURVE)
    assert section.count("<tr>") == 1 + len(POINTS)
    assert "uniform &lt;int4&gt;" in section and "<int4>" not in section
    for cell in ("0.397", "0.018", "2.0e-04", "0.300"):
        assert f"<td>{cell}</td>" in section


def test_one_point_is_drawn_too() -> None:
    root = parsed(picture("mixed", TradeOff(1, 10, "u", (Point("a", "hull", 5, 0.1, 0.1),))))
    assert len(root.findall(f"{NAMESPACE}circle")) == 1
    assert picture("mixed", TradeOff(1, 10, "u", (Point("a", "hull", 5, 0.0, 0.0),))).startswith(
        "<p>"
    )


def test_reading(tmp_path: Path) -> None:
    assert read_tradeoff(tmp_path) is None
    good = {
        "schema": 1,
        "float16_bytes": 10,
        "unit": "u",
        "points": [
            {"label": "a", "kind": "hull", "bytes": 5, "predicted_kl": 0.1, "measured_kl": 0.2}
        ],
    }
    path = tmp_path / "tradeoff.json"
    path.write_text(json.dumps(good))
    found = read_tradeoff(tmp_path)
    assert found is not None and found.points[0].measured_kl == 0.2
    point = good["points"][0]  # type: ignore[index]
    for bad in (
        good | {"schema": 2},
        good | {"points": []},
        good | {"points": [point | {"kind": "odd"}]},
        good | {"points": [point | {"bytes": -5}]},
        {},
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(InputRefused, match=r"tradeoff.json: .*quantize the model again"):
            read_tradeoff(tmp_path)
