"""Pictures of the report as inline SVG: what each model costs against what it keeps, and how far
single captions moved. Each has an alt text; its figures stand in the tables too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporter.compare import html
from exporter.compare.candidates import NOISE_FLOOR
from exporter.compare.records import Comparison, Row
from exporter.compare.wording import megabytes, number, percent, small

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 18, 50
LINE_HEIGHT = 46
# Shown as the lowest value of a logarithmic axis, where a zero has no place of its own.
FLOOR = 1e-9
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Mark:
    """A named point; `low` and `high` are its interval along the vertical axis, if it has one."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` (powers of ten where `logarithmic`) and how its values are said."""

    title: str
    low: float
    high: float
    said: Callable[[float], str]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Place of a value between the ends, 0 to 1."""
        if self.logarithmic:
            value, low, high = (math.log10(max(v, FLOOR)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Values to write beside the axis."""
        if self.logarithmic:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**n for n in range(first, last + 1)]
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def _round_step(step: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is no larger."""
    power = 10.0 ** math.floor(math.log10(step))
    return max(power * n for n in (1, 2, 5) if n == 1 or power * n <= step)


def linear_axis(title: str, values: Sequence[float], said: Callable[[float], str]) -> Axis:
    """From a little under the least value to a little over the largest."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(title, low - room if low - room > 0 or low < 0 else 0.0, high + room, said)


def log_axis(title: str, values: Sequence[float], said: Callable[[float], str]) -> Axis:
    """Whole decades around all values."""
    known = [max(v, FLOOR) for v in values]
    first = math.floor(math.log10(min(known)))
    last = max(math.ceil(math.log10(max(known))), first + 1)
    return Axis(title, 10.0**first, 10.0**last, said, logarithmic=True)


def plots(c: Comparison) -> str:
    """All pictures of a comparison that its figures allow."""
    return "".join((size_against_kl(c), latency_against_facts(c), captions_moved(c)))


def size_against_kl(c: Comparison) -> str:
    """Megabytes on disk against mean KL, with the interval of two standard errors."""
    marks = []
    for row in _models(c):
        d = row.distribution
        if d and row.parts:
            wide = 2 * (d.kl_standard_error or 0.0)
            low, high = max(d.kl_mean - wide, FLOOR), d.kl_mean + wide
            marks.append(Mark(row.name, row.bytes, d.kl_mean, low, high))
    if not marks:
        return ""
    floor = next((r.distribution for r in c.rows if r.name == NOISE_FLOOR), None)
    level = floor.kl_mean if floor else None
    values = [v for m in marks for v in (m.y, m.high or m.y)] + ([level] if level else [])
    x = linear_axis("megabytes on disk", [m.x for m in marks], lambda v: f"{v / 1e6:.4g}")
    y = log_axis("mean KL, nats per token", values, lambda v: f"{v:.0e}")
    said = "Megabytes on disk against mean KL: " + "; ".join(
        f"{m.name} {megabytes(round(m.x))} MB, {small(m.y)}" for m in marks
    )
    return _figure("Size against distance from the reference", said, x, y, marks, level)


def latency_against_facts(c: Comparison) -> str:
    """Median milliseconds of a whole caption against the share of facts that is right."""
    rows = [(r, r.speed, r.truth) for r in c.rows if r.name != NOISE_FLOOR]
    marks = [
        Mark(r.name, s.total, t.recall.value, t.recall.low, t.recall.high)
        for r, s, t in rows
        if s and t
    ]
    if not marks:
        return ""
    values = [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
    x = linear_axis("milliseconds per caption, median", [m.x for m in marks], lambda v: f"{v:.4g}")
    y = linear_axis("facts right, 95 % interval", values, percent)
    said = "Milliseconds per caption against facts right: " + "; ".join(
        f"{m.name} {number(m.x)} ms, {percent(m.y)}" for m in marks
    )
    return _figure("Latency against clinical facts", said, x, y, marks, None)


def captions_moved(c: Comparison) -> str:
    """The mean KL of single captions, one line per model: extremes, quartiles, median."""
    lines = []
    for row in _models(c, floor=True):
        values = sorted(k for case in c.cases if (k := case.captions[row.name].kl_mean) is not None)
        if len(values) >= len(QUANTILES):
            lines.append((row.name, [_quantile(values, q) for q in QUANTILES]))
    if not lines:
        return ""
    axis = log_axis(
        "mean KL of a caption, nats per token",
        [v for _, five in lines for v in five],
        lambda v: f"{v:.0e}",
    )
    said = "Mean KL of single captions, least, quartiles and largest: " + "; ".join(
        f"{name} {', '.join(small(v) for v in five)}" for name, five in lines
    )
    height = TOP + LINE_HEIGHT * len(lines) + BOTTOM
    parts = [_horizontal(axis, height)]
    for number_, (name, five) in enumerate(lines):
        at = TOP + LINE_HEIGHT * (number_ + 0.6)
        least, first, middle, third, most = (_x(axis, v) for v in five)
        parts.append(f'<path d="M{least:.1f} {at:.1f}H{most:.1f}" stroke="currentColor"/>\n')
        parts.append(
            f'<rect x="{first:.1f}" y="{at - 7:.1f}" width="{max(third - first, 1):.1f}" '
            'height="14" fill="none" stroke="currentColor" stroke-width="1.5"/>\n'
        )
        parts.append(
            f'<path d="M{middle:.1f} {at - 10:.1f}v20" stroke="currentColor" stroke-width="3"/>\n'
        )
        parts.append(f'<text x="{LEFT}" y="{at - 14:.1f}">{html.text(name)}</text>\n')
    return _svg("How far single captions moved", said, height, "".join(parts))


def _models(c: Comparison, *, floor: bool = False) -> list[Row]:
    """Candidates, and the noise floor if asked."""
    roles = ("candidate", "noise floor") if floor else ("candidate",)
    return [row for row in c.rows if row.role in roles]


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, linear between neighbours."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _figure(
    title: str, said: str, x: Axis, y: Axis, marks: Sequence[Mark], level: float | None
) -> str:
    """Points with whiskers; `level` is drawn as a dashed line, the noise floor."""
    parts = [_horizontal(x, HEIGHT), _vertical(y)]
    if level is not None:
        at = _y(y, level)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="currentColor" '
            f'stroke-dasharray="5 4"/>\n<text x="{WIDTH - RIGHT}" y="{at - 5:.1f}" '
            f'text-anchor="end">noise floor {small(level)}</text>\n'
        )
    taken: list[tuple[float, float]] = []
    for mark in marks:
        px, py = _x(x, mark.x), _y(y, mark.y)
        if mark.low is not None and mark.high is not None:
            parts.append(
                f'<path d="M{px:.1f} {_y(y, mark.low):.1f}V{_y(y, mark.high):.1f}" '
                'stroke="currentColor" stroke-opacity=".6"/>\n'
            )
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>\n')
        place = py - 9
        while any(abs(px - ox) < 90 and abs(place - oy) < 13 for ox, oy in taken):
            place -= 13
        taken.append((px, place))
        anchor = "end" if px > WIDTH - 110 else "start"
        parts.append(
            f'<text x="{px + (-8 if anchor == "end" else 8):.1f}" y="{place:.1f}" '
            f'text-anchor="{anchor}">{html.text(mark.name)}</text>\n'
        )
    return _svg(title, said, HEIGHT, "".join(parts))


def _horizontal(axis: Axis, height: int) -> str:
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    parts = [f'<path d="M{LEFT} {bottom}H{right}" fill="none" stroke="currentColor"/>\n']
    for tick in axis.ticks():
        at = _x(axis, tick)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="currentColor"/>\n')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{axis.said(tick)}</text>\n'
        )
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{axis.title}</text>\n')
    return "".join(parts)


def _vertical(axis: Axis) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}" fill="none" stroke="currentColor"/>\n']
    for tick in axis.ticks():
        at = _y(axis, tick)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="currentColor" '
            'stroke-opacity=".2"/>\n'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{axis.said(tick)}</text>\n'
        )
    place = f'transform="translate(15 {(TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text {place} text-anchor="middle">{axis.title}</text>\n')
    return "".join(parts)


def _svg(title: str, said: str, height: int, inner: str) -> str:
    return (
        f'<figure><figcaption>{html.text(title)}</figcaption>\n<svg role="img" '
        f'aria-label="{html.text(said)}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" style="max-width:100%;height:auto" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">\n'
        f"<title>{html.text(said)}</title>\n{inner}</svg></figure>\n"
    )
