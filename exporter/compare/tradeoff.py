"""Bytes against quality of a mixed scheme: the measured curve as a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from exporter.compare import html
from exporter.compare.wording import megabytes, small
from exporter.core.errors import InputRefused

TRADEOFF = "tradeoff.json"
SCHEMA = 1
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 52
TICKS = 6
MARKS = {"hull": "along the hull", "uniform": "uniform bits", "chosen": "chosen, as stored"}


class Point(msgspec.Struct, frozen=True):
    """A choice of bits: bytes of weights, KL predicted from the units and measured (nats a token)."""

    label: str
    kind: Literal["hull", "uniform", "chosen"]
    bytes: int
    predicted_kl: float
    measured_kl: float


class TradeOff(msgspec.Struct, frozen=True):
    """The content of tradeoff.json."""

    schema: int
    float16_bytes: int
    unit: str
    points: tuple[Point, ...]


def read_tradeoff(folder: Path) -> TradeOff | None:
    """The curve beside an exported model, or None without one. Raises `InputRefused` when broken."""
    path = folder / TRADEOFF
    if not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=TradeOff)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputRefused(f"{path}: {error}; quantize the model again") from error
    values = [v for p in found.points for v in (p.bytes, p.predicted_kl, p.measured_kl)]
    if found.schema != SCHEMA or not found.points or not all(v >= 0 for v in values):
        raise InputRefused(f"{path}: no curve of schema {SCHEMA}; quantize the model again")
    return found


def tradeoff_section(name: str, curve: TradeOff) -> str:
    """Heading, picture and table of the curve of the model `name`."""
    ranked = sorted(curve.points, key=lambda p: (p.bytes, p.measured_kl))
    rows = [
        (
            p.label,
            MARKS[p.kind],
            f"{p.bytes / 1e6:.2f}",
            f"{p.bytes / curve.float16_bytes:.3f}",
            small(p.predicted_kl),
            small(p.measured_kl),
        )
        for p in ranked
    ]
    header = ("choice", "kind", "MB of weights", "of float16", "KL predicted", "KL measured")
    caption = f"Choices of bits for {name}: {curve.unit}; float16 takes {megabytes(curve.float16_bytes)} MB"
    return f"<h3>{html.text(name)}</h3>\n{picture(name, curve)}\n" + html.table(
        caption, header, rows, words=2
    )


def picture(name: str, curve: TradeOff) -> str:
    """The curve as an inline SVG: megabytes of weights against measured KL on a logarithmic axis."""
    shown = [p for p in curve.points if p.measured_kl > 0]
    if not shown:
        return "<p>No choice moved the model measurably.</p>"
    axes = _Axes([p.bytes for p in shown], [p.measured_kl for p in shown])
    hull = sorted((p for p in shown if p.kind == "hull"), key=lambda p: p.bytes)
    line = " ".join(f"{axes.x(p.bytes):.1f},{axes.y(p.measured_kl):.1f}" for p in hull)
    best, worst = (min(shown, key=lambda p: p.bytes), max(shown, key=lambda p: p.bytes))
    said = (
        f"Measured KL of {name} against megabytes of weights, {len(shown)} choices of bits: from "
        f"{small(best.measured_kl)} nats at {megabytes(best.bytes)} MB to "
        f"{small(worst.measured_kl)} nats at {megabytes(worst.bytes)} MB"
    )
    marks = "".join(_mark(p, axes.x(p.bytes), axes.y(p.measured_kl)) for p in shown)
    return (
        f'<svg role="img" aria-label="{html.text(said)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" style="max-width:100%;height:auto" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">\n'
        f"<title>{html.text(said)}</title>\n{axes.drawn()}"
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>\n'
        f"{marks}</svg>"
    )


class _Axes:
    """Where values lie in the picture, and the lines and numbers beside it."""

    def __init__(self, sizes: Sequence[int], losses: Sequence[float]) -> None:
        low, high = min(sizes), max(sizes)
        room = 0.05 * (high - low) or 0.05 * high or 1.0
        self._x = (max(low - room, 0.0), high + room)
        decades = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
        self._y = (decades[0], max(decades[1], decades[0] + 1))

    def x(self, size: float) -> float:
        low, high = self._x
        return LEFT + (size - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (math.log10(loss) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self) -> str:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        grid = 'stroke="currentColor" stroke-opacity=".25"'
        parts = [
            f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="currentColor"/>\n',
            _words("megabytes of weights", f'x="{(LEFT + right) / 2}" y="{HEIGHT - 10}"'),
            _words(
                "measured KL, nats per token",
                f'transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)"',
            ),
        ]
        for value, said in _ticks(*self._x):
            at = self.x(value)
            parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="currentColor"/>\n')
            parts.append(_words(said, f'x="{at:.1f}" y="{bottom + 20}"'))
        for decade in range(self._y[0], self._y[1] + 1):
            at = self.y(10.0**decade)
            parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" {grid}/>\n')
            parts.append(
                f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>\n'
            )
        return "".join(parts)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About `TICKS` round numbers of bytes between two sizes, as megabytes."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    digits = max(0, -math.floor(math.log10(step / 1e6)))
    places = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(place, f"{place / 1e6:.{digits}f}") for place in places]


def _words(said: str, place: str) -> str:
    return f'<text {place} text-anchor="middle">{said}</text>\n'


def _mark(point: Point, x: float, y: float) -> str:
    match point.kind:
        case "hull":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>\n'
        case "uniform":
            box = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="none" '
            return box + 'stroke="currentColor" stroke-width="2"/>\n' + _label(point, x, y - 9)
        case "chosen":
            d = f"M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8 -8z"
            shape = f'<path d="{d}" fill="none" stroke="currentColor" stroke-width="2"/>\n'
            return shape + _label(point, x, y + 21)


def _label(point: Point, x: float, y: float) -> str:
    """The name beside a mark, turned inwards near an edge."""
    anchor = "end" if x > WIDTH - 120 else "start" if x < LEFT + 60 else "middle"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.text(point.label)}</text>\n'
