"""Line charts as inline SVG, without a plotting library: they follow the page's colours, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 540, 230  # of the viewBox: one unit is one pixel at the usual size
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MOST_POINTS = 240
"""Of one line. More are averaged in groups of neighbours, which the page notes."""


@dataclass(frozen=True)
class Line:
    """A named curve of (x, y); `style` 0..2 chooses colour and dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """One chart of the page: `svg`, and a legend of (name, style, last value)."""

    title: str
    svg: Markup
    legend: list[tuple[str, int, str]]
    note: str = ""


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    x_name: str = "epoch",
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    zero: bool = False,
    note: str = "",
) -> Chart:
    """Draw `lines` over one x axis; `marks` are vertical lines at x, `levels` horizontal ones at y, each with a label.

    `zero` makes the y axis start at 0. Values that are not finite are left out.
    """
    full = [Line(line.name, _finite(line.points), line.style) for line in lines]
    drawn = [Line(line.name, thinned(line.points), line.style) for line in full if line.points]
    if not drawn:
        return Chart(title, Markup(), [], "Nothing was logged yet.")
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + [y for y, _ in levels]
    x_ticks = ticks(min(0.0, *xs), max(xs), 6)
    y_ticks = ticks(min(*ys, 0.0) if zero else min(ys), max(ys), 5)
    if any(y > y_ticks[-1] - 0.1 * (y_ticks[-1] - y_ticks[0]) for y, _ in levels):
        y_ticks.append(2 * y_ticks[-1] - y_ticks[-2])  # room for the level's label above it
    frame = _Frame(min(0.0, *xs), max(*xs, 1e-9), y_ticks[0], y_ticks[-1])

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {frame.y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, frame.y(y) + 4, number(y, y_ticks), "end"))
    for x in [x for x in x_ticks if x <= frame.x_high * 1.0001]:
        parts.append(f'<path class="tick" d="M{frame.x(x):.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(_text(frame.x(x), HEIGHT - BOTTOM + 17, number(x, x_ticks), "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "middle", "name"))
    parts.append(
        f'<text class="name" text-anchor="middle" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) '
        f'rotate(-90)">{escape(unit)}</text>'
    )
    for y, label in levels:
        parts.append(f'<path class="level" d="M{LEFT} {frame.y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(WIDTH - RIGHT - 4, frame.y(y) - 5, label, "end", "level"))
    for x, _ in marks:
        parts.append(f'<path class="mark" d="M{frame.x(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for line in drawn:
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
        parts.append(f'<path class="line s{line.style}" d="M{path}"/>')
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(f'<circle class="dot s{line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"/>')
    for x, label in marks:  # over the curves, to stay readable
        right = frame.x(x) > WIDTH - 80
        place = frame.x(x) + (-4 if right else 4)
        parts.append(_text(place, HEIGHT - BOTTOM - 6, label, "end" if right else "start", "mark"))
    parts += _hover(drawn, frame, x_name)
    parts.append("</svg>")
    legend = [(line.name, line.style, short(line.points[-1][1])) for line in full if line.points]
    return Chart(title, Markup("".join(parts)), legend, note)  # all text in it went through `escape`


@dataclass(frozen=True)
class _Frame:
    """From values to places in the viewBox."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose low..high."""
    if not high - low > abs(high) * 1e-9:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float, among: Sequence[float]) -> str:
    """Return a tick's label, with as many decimals as the steps between ticks need."""
    step = among[1] - among[0]
    decimals = next(d for d in range(12) if abs(step - round(step, d)) < step * 1e-6)
    return f"{value if abs(value) > step * 1e-6 else 0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def short(value: float) -> str:
    """Return a measured value for reading: three significant digits or more."""
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(decimals, 6)}f}".replace("-", "\N{MINUS SIGN}")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: means of groups of neighbours."""
    groups = min(len(points), MOST_POINTS)
    edges = [len(points) * index // groups for index in range(groups + 1)] if groups else []
    parts = [points[start:stop] for start, stop in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _hover(lines: Sequence[Line], frame: _Frame, x_name: str) -> list[str]:
    """Return invisible strips over the plot, whose tooltips show the values without a script."""
    points = lines[0].points
    edges = [frame.x(frame.x_low), *((frame.x(a[0]) + frame.x(b[0])) / 2 for a, b in pairwise(points))]
    edges.append(frame.x(frame.x_high))
    strips = []
    for index, (x, _) in enumerate(points):
        values = [f"{line.name} {short(line.points[index][1])}" for line in lines if index < len(line.points)]
        tooltip = escape(f"{x_name} {x:.2f}: {', '.join(values)}")
        strips.append(
            f'<rect class="strip" x="{edges[index]:.1f}" y="{TOP}" width="{edges[index + 1] - edges[index]:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{tooltip}</title></rect>'
        )
    return strips


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
